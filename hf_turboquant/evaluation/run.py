"""All parts of an evaluation in one run: progress, results to resume from, tables and plots."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..conditioning import head_dim
from . import claims, fidelity, needle, plots, quality
from .caches import FULL, label, new_cache
from .load import Settings, machine

# For the claims: bits, dimensions of the distortion, and estimators of keys with their sketch.
WIDTHS = (4, 3, 2)
DIMENSIONS = (64, 128, 256)
PLOTS = {"quality": "overview.png", "fidelity": "fidelity.png"}
ESTIMATORS = (("mse", "orthogonal"), ("rescaled", "orthogonal"), ("qjl", "gaussian"), ("qjl", "orthogonal"))


class Results:
    """
    Results by name, saved after each new one.

    Args:
        folder (`Path`): holds `results.json`; made if it is missing.
        conditions (`dict`): everything that the results depend on, as json represents it.

    Raises:
        `ValueError`: the folder holds results under other conditions, or a file that is not of this command.
    """

    def __init__(self, folder: Path, conditions: dict):
        self.path = Path(folder) / "results.json"
        self.conditions, self.units = json.loads(json.dumps(conditions)), {}
        if not self.path.exists():
            return
        advice = f"Give another --out, or remove {self.path}."
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before, self.units = dict(found["conditions"]), dict(found["results"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} must hold results of this command, and cannot be read. {advice}") from None
        for name, now in self.conditions.items():
            # Without results, there is nothing that must have the same conditions.
            if self.units and before.get(name) != now:
                other = f"{name} {before.get(name)}, now {now}"
                raise ValueError(f"{self.path} holds results of other conditions: {other}. {advice}")

    def get(self, name: str, compute: Callable[..., dict], *arguments) -> dict:
        """Returns the saved result of that name, or computes it from `arguments` and saves it."""
        if name not in self.units:
            # Through json, so that a resumed run sees the same as this one.
            self.units[name] = json.loads(json.dumps(compute(*arguments)))
            self.save()
        return self.units[name]

    def save(self) -> None:
        """Writes everything; a `ValueError` if the folder cannot be written to."""
        new, content = self.path.with_suffix(".new"), {"conditions": self.conditions, "results": self.units}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(content, indent=1), encoding="utf-8")
            # Renamed only when complete: a run that dies here leaves the previous file.
            os.replace(new, self.path)
        except OSError as error:
            folder = f"got {self.path.parent}: {error.strerror}."
            raise ValueError(f"--out must be a folder that can be written to, {folder}") from None


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
    if "quality" in settings.parts:
        quality.split_windows(tokenizer, text, settings.window, settings.windows)
    conditions = {**asdict(settings), "dtype": str(model.dtype).removeprefix("torch."), **machine(model.device)}
    # Only after text and settings have been checked.
    results = Results(out, conditions)
    results.save()
    with Progress(console=console, transient=True) as progress:
        for part in settings.parts:
            track = partial(progress.track, description=part)
            *found, figure = _PARTS[part](model, tokenizer, text, settings, results, track)
            console.print(*found)
            if figure:
                path = Path(out) / PLOTS[part]
                figure.savefig(path, dpi=120)
                console.print(f"plot: {path}", soft_wrap=True, highlight=False)
    return results


# Each part measures what `results` lacks, while `track` shows how far it is, and returns its tables and its plot.


def _quality(model, tokenizer, text, settings, results, track) -> tuple:
    blocks = {name: getattr(settings, name) for name in ("block", "prefill", "score_from")}
    windows = quality.split_windows(tokenizer, text, settings.window, settings.windows)
    batches = windows.to(model.device).split(settings.batch)

    # Of one batch at a time; a run that goes on needs that of the batch where the last one stopped.
    @lru_cache(maxsize=1)
    def full(index: int) -> quality.Full:
        return quality.Full(model, batches[index], **blocks)

    def measure(index: int, options: dict | None) -> dict:
        found = full(index).quality
        if options is not None:
            found = full(index).compare(new_cache(model.config, options))
        return {**asdict(found), "kls": _rounded(found.kls)}

    names = {"full cache": None, **{label(options): options for options in settings.caches}}
    found = {name: quality.Quality() for name in names}
    for index, name in track(list(product(range(len(batches)), names))):
        unit = results.get(f"quality: window {index * settings.batch}, {name}", measure, index, names[name])
        found[name] += quality.Quality(**unit)
    title = f"Quality: {settings.windows} × {settings.window:,} tokens, scored from {settings.score_from:,}"
    columns = "cache", "bits", "all bits", "perplexity", "KL", "KL p99", "top-1", "smaller"
    table = _table(title, *columns)
    for name, q in found.items():
        cells = f"{q.total_bits:.2f}", f"{q.bits:.2f}", f"{q.perplexity:.2f}", f"{q.kl:.4f}", f"{q.kl_p99:.3f}"
        table.add_row(name, *cells, f"{q.agreement:.3f}", f"{q.compression_ratio:.2f}")
    return table, plots.overview_figure(found, settings.caches, model.config)


def _needle(model, tokenizer, text, settings, results, track) -> tuple:
    title = f"Needle: exact answers at depths {', '.join(f'{depth:.0%}' for depth in settings.needle_depths)}"
    table = _table(title, "cache", *(f"{length:,} tokens" for length in settings.needle_lengths))
    for options in track([FULL, *settings.caches]):
        cells, find = [], partial(needle.find_needle, model, tokenizer, text, options)
        for length in settings.needle_lengths:
            name = f"needle: {label(options)}, {length} tokens, depth"
            exact = [results.get(f"{name} {depth}", find, length, depth)["exact"] for depth in settings.needle_depths]
            cells.append(f"{''.join('✗✓'[found] for found in exact)} {sum(exact)}/{len(exact)}")
        table.add_row(label(options), *cells)
    return table, None


def _fidelity(model, tokenizer, text, settings, results, track) -> tuple:
    @lru_cache
    def captured() -> list[fidelity.LayerInputs]:
        return fidelity.capture(model, quality.split_windows(tokenizer, text, max(settings.fidelity_lengths), 1))

    def compare(options, length) -> dict:
        found = [fidelity.compare(model.config, layer, options, length) for layer in captured()]
        layers = {"layer": [layer.layer_idx for layer in captured()]}
        return layers | {name: _rounded(layer[name] for layer in found) for name in found[0]}

    names = "codes:\ncosine", "top-1", "all:\ncosine", "top-1", "output\nerror"
    used = _table("Attention, means over layers: scores of tokens in codes and of all", "cache", "tokens", *names)
    asked = _table("Scores where a key asks", "cache", "tokens", "cosine", "top-1")
    longest = {}
    for options, length in track(list(product(settings.caches, sorted(settings.fidelity_lengths)))):
        name = label(options)
        unit = longest[name] = results.get(f"fidelity: {name}, {length} tokens", compare, options, length)
        means = {key: f"{sum(layers) / len(layers):.4f}" for key, layers in unit.items()}
        keys = "cosine", "top1", "all_cosine", "all_top1", "output_error"
        used.add_row(name, f"{length:,}", *(means[key] for key in keys))
        asked.add_row(name, f"{length:,}", means["key_cosine"], means["key_top1"])
    asked.add_section()
    for nbits, published in fidelity.BENCHMARK.items():
        asked.add_row(f"published, {nbits} bits", "8,192", *published)
    about = f"{fidelity.DIFFERENCES} Here {settings.model} reads {settings.text}."
    title = f"Error by layer, {max(settings.fidelity_lengths):,} tokens"
    return used, asked, about, plots.fidelity_figure(longest, title)


def _claims(model, tokenizer, text, settings, results, track) -> tuple:
    names = "d", "measured", "codebook", "paper", "upper bound", "measured / d", "benchmark"
    table = _table("Distortion of random unit vectors of dimension d (Algorithm 1)", "bits", *names)
    names = "bits", "slope", "d × variance", "paper"
    products = _table("Inner products of random unit vectors (unbiased: slope 1)", "estimator", *names)
    for nbits in track(WIDTHS):
        for dim in DIMENSIONS:
            unit = results.get(f"claims: distortion, {nbits} bits, dimension {dim}", claims.distortion, nbits, dim)
            measured, codebook, bound = (f"{unit[name]:.5f}" for name in ("measured", "codebook", "upper_bound"))
            cells = str(dim), measured, codebook, claims.PAPER_DISTORTION[nbits], bound, f"{unit['measured'] / dim:.6f}"
            table.add_row(str(nbits), *cells, claims.BENCHMARK_DISTORTION.get((nbits, dim), ""))
        for estimator, sketch in ESTIMATORS:
            name = f"claims: inner product, {nbits} bits, {estimator} {sketch}"
            unit = results.get(name, claims.inner_product, estimator, nbits, head_dim(model.config), sketch)
            name = f"{estimator}, {sketch} sketch" if estimator == "qjl" else estimator
            published = claims.PAPER_VARIANCE.get((nbits, estimator, sketch), "")
            products.add_row(name, str(nbits), f"{unit['slope']:.3f}", f"{unit['variance']:.4f}", published)
    return table, products, None


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


_PARTS = {"quality": _quality, "needle": _needle, "fidelity": _fidelity, "claims": _claims}
