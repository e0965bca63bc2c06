"""All parts of an evaluation in one run: progress, resuming, tables and plots."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table

from ..conditioning import head_dim
from . import claims, fidelity, needle, plots, quality
from .caches import FULL, label, rows
from .load import Settings, machine
from .results import Results

# For the claims: bits, dimensions of the distortion, and estimators of keys with their sketch.
WIDTHS = (4, 3, 2)
DIMENSIONS = (64, 128, 256)
ESTIMATORS = (("mse", "orthogonal"), ("rescaled", "orthogonal"), ("qjl", "gaussian"), ("qjl", "orthogonal"))


def evaluate(model, tokenizer, text: str, settings: Settings, out: Path, console: Console | None = None) -> Results:
    """
    Measures everything that `settings` asks for and that the folder `out` does not hold yet, with a causal language
    model in evaluation mode, on a text to predict and to hide needles in; writes `results.json` and plots, and prints
    tables and progress to `console`.

    Raises:
        `ValueError`: see [`Settings.check`] and [`Results`].
    """
    console = console or Console()
    settings.check(model.config, text)
    conditions = {**asdict(settings), "dtype": str(model.dtype).removeprefix("torch."), **machine(model.device)}
    parts = {part: list(_UNITS[part](model, tokenizer, text, settings)) for part in settings.parts}
    # Only after text and settings have been checked.
    results = Results(out, conditions)
    results.save()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, parts.values())))
        for name, compute in ((f"{part}: {name}", compute) for part in parts for name, compute in parts[part]):
            progress.update(task, description=name)
            results.get(name, compute)
            progress.advance(task)
    for part in parts:
        console.print(_TABLES[part](results.units, settings))
    for path in plots.draw(results.units, settings, Path(out), model.config):
        console.print(f"plot: {path}", soft_wrap=True, highlight=False)
    return results


# The units of each part: a name, and a function that measures it.


def _quality_units(model, tokenizer, text, settings):
    blocks = {name: getattr(settings, name) for name in ("block", "prefill", "score_from")}
    windows = quality.split_windows(tokenizer, text, settings.window, settings.windows)
    batches = windows.to(model.device).split(settings.batch)

    # Of one batch at a time; a run that goes on needs that of the batch where the last one stopped.
    @lru_cache(maxsize=1)
    def full(index: int) -> quality.Full:
        return quality.read_full(model, batches[index], **blocks)

    def measure(index: int, options: dict | None) -> dict:
        found = full(index)
        found = found.quality if options is None else quality.compare(model, batches[index], options, found, **blocks)
        return {**asdict(found), "kls": _rounded(found.kls)}

    for index in range(len(batches)):
        for options in (None, *settings.caches):
            name = f"window {index * settings.batch}, {label(options) if options else 'full cache'}"
            yield name, partial(measure, index, options)


def _needle_units(model, tokenizer, text, settings):
    for options in [FULL, *settings.caches]:
        for length in settings.needle_lengths:
            for depth in settings.needle_depths:
                find = partial(needle.find_needle, model, tokenizer, text, options, length, depth)
                yield f"{label(options)}, {length} tokens, depth {depth}", find


def _fidelity_units(model, tokenizer, text, settings):
    @lru_cache
    def captured() -> list[fidelity.LayerInputs]:
        ids = quality.split_windows(tokenizer, text, max(settings.fidelity_lengths), 1)
        return fidelity.capture(model, ids)

    def compare(options, length) -> dict:
        found = [fidelity.compare(model.config, layer, options, length) for layer in captured()]
        layers = {"layer": [layer.layer_idx for layer in captured()]}
        return layers | {name: _rounded(layer[name] for layer in found) for name in found[0]}

    for options in settings.caches:
        for length in settings.fidelity_lengths:
            yield f"{label(options)}, {length} tokens", partial(compare, options, length)


def _claims_units(model, tokenizer, text, settings):
    for nbits in WIDTHS:
        for dim in DIMENSIONS:
            yield f"distortion, {nbits} bits, dimension {dim}", partial(claims.distortion, nbits, dim)
        for estimator, sketch in ESTIMATORS:
            measure = partial(claims.inner_product, estimator, nbits, head_dim(model.config), sketch)
            yield f"inner product, {nbits} bits, {estimator} {sketch}", measure


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]


def _quality_table(units: dict, settings: Settings) -> Table:
    title = f"Quality: {settings.windows} × {settings.window:,} tokens, scored from {settings.score_from:,}"
    table = _table(title, "cache", "bits", "perplexity", "KL", "KL p99", "top-1", "smaller")
    found = quality.total(units)

    def cells(name: str):
        q = found[name]
        numbers = f"{q.total_bits:.2f}", f"{q.perplexity:.2f}", f"{q.kl:.4f}", f"{q.kl_p99:.3f}", f"{q.agreement:.3f}"
        yield *numbers, f"{q.compression_ratio:.2f}"

    table.add_row("full cache", *next(cells("full cache")))
    return _add_caches(table, settings.caches, cells)


def _needle_table(units: dict, settings: Settings) -> Table:
    title = f"Needle: exact answers at depths {', '.join(f'{depth:.0%}' for depth in settings.needle_depths)}"
    table = _table(title, "cache", *(f"{length:,} tokens" for length in settings.needle_lengths))

    def cells(name: str):
        grid = [
            [units[f"needle: {name}, {length} tokens, depth {depth}"]["exact"] for depth in settings.needle_depths]
            for length in settings.needle_lengths
        ]
        marks = ("".join("✗✓"[found] for found in exact) for exact in grid)
        yield [f"{mark} {sum(exact)}/{len(exact)}" for mark, exact in zip(marks, grid, strict=True)]

    return _add_caches(table, [FULL, *settings.caches], cells)


def _fidelity_table(units: dict, settings: Settings) -> Group:
    names = "codes:\ncosine", "top-1", "all:\ncosine", "top-1", "output\nerror"
    used = _table("Attention, means over layers: scores of tokens in codes and of all", "cache", "tokens", *names)
    asked = _table("Scores where a key asks", "cache", "tokens", "cosine", "top-1")

    def cells(name: str, *keys: str):
        for length in settings.fidelity_lengths:
            unit = units[f"fidelity: {name}, {length} tokens"]
            yield f"{length:,}", *(f"{sum(unit[key]) / len(unit[key]):.4f}" for key in keys)

    keys = "cosine", "top1", "all_cosine", "all_top1", "output_error"
    _add_caches(used, settings.caches, lambda name: cells(name, *keys))
    _add_caches(asked, settings.caches, lambda name: cells(name, "key_cosine", "key_top1"))
    asked.add_section()
    for nbits, published in fidelity.BENCHMARK.items():
        asked.add_row(f"published, {nbits} bits", "8,192", *published)
    return Group(used, asked, f"{fidelity.DIFFERENCES} Here {settings.model} reads {settings.text}.")


def _claims_table(units: dict, settings: Settings) -> Group:
    names = "d", "measured", "codebook", "paper", "upper bound", "measured / d", "benchmark"
    table = _table("Distortion of random unit vectors of dimension d (Algorithm 1)", "bits", *names)
    names = "bits", "slope", "d × variance", "paper"
    products = _table("Inner products of random unit vectors (unbiased: slope 1)", "estimator", *names)
    for nbits in WIDTHS:
        for dim in DIMENSIONS:
            unit = units[f"claims: distortion, {nbits} bits, dimension {dim}"]
            measured, codebook, bound = (f"{unit[name]:.5f}" for name in ("measured", "codebook", "upper_bound"))
            cells = str(dim), measured, codebook, claims.PAPER_DISTORTION[nbits], bound, f"{unit['measured'] / dim:.6f}"
            table.add_row(str(nbits), *cells, claims.BENCHMARK_DISTORTION.get((nbits, dim), ""))
        for estimator, sketch in ESTIMATORS:
            unit = units[f"claims: inner product, {nbits} bits, {estimator} {sketch}"]
            name = f"{estimator}, {sketch} sketch" if estimator == "qjl" else estimator
            published = claims.PAPER_VARIANCE.get((nbits, estimator, sketch), "")
            products.add_row(name, str(nbits), f"{unit['slope']:.3f}", f"{unit['variance']:.4f}", published)
    return Group(table, products)


def _add_caches(table: Table, caches: list[dict], cells: Callable[[str], Iterable]) -> Table:
    """Adds rows for every cache, given its label; caches that share options get a common head that states them."""
    for head, members in groupby(rows(caches), lambda row: row.head):
        table.add_section()
        if head:
            table.add_row(f"[bold]{head}[/bold]")
        for row in members:
            for line in cells(row.label):
                table.add_row(" " * bool(head) + row.text, *line)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


_UNITS = {"quality": _quality_units, "needle": _needle_units, "fidelity": _fidelity_units, "claims": _claims_units}
_TABLES = {"quality": _quality_table, "needle": _needle_table, "fidelity": _fidelity_table, "claims": _claims_table}
