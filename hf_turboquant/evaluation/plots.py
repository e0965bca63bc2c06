"""The plots of an evaluation, as PNG files."""

from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..estimate import Estimate
from .caches import label
from .quality import total

# Okabe and Ito's colours, which colour-blind people tell apart; marks differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "osD^vPX"


def draw(results, settings, out: Path, config) -> list[Path]:
    """
    Writes `overview.png` (quality and memory side by side), `needle.png` and `fidelity.png` to `out`, those whose
    results there are; `memory.png` where there is no overview.

    Returns:
        The files.
    """
    figures = {}
    if "quality" in settings.parts:
        found = total(results.units, settings.windows)
        figures["overview"] = overview_figure(found, settings.caches, config)
    else:
        figures["memory"] = memory_figure(config)
    if "needle" in settings.parts:
        figures["needle"] = needle_figure(results.units, settings)
    if "fidelity" in settings.parts:
        figures["fidelity"] = fidelity_figure(results.units, settings)
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def figure_and_axes(columns: int = 1, width: float = 6.4, height: float = 4.2, rows: int = 1):
    """An empty figure that has nothing to do with pyplot's state, and its axes, row by row."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes if rows * columns > 1 else axes[0]


def overview_figure(qualities: dict, caches: list[dict], config) -> Figure:
    """KL divergence against bits in all, and bytes against context: low and left is good."""
    figure, (left, right) = figure_and_axes(2, width=10)
    lines: dict[str, list] = {}
    for options in caches:
        found = qualities[label(options)]
        method = label({name: value for name, value in options.items() if name != "nbits"})
        lines.setdefault(method, []).append((found.total_bits, found.kl))
    for index, (method, points) in enumerate(lines.items()):
        left.plot(*zip(*sorted(points), strict=True), label=method, **_style(index))
    left.set(xlabel="bits per coordinate, scales included", ylabel="KL to the full cache (nats)", yscale="log")
    left.set_title("Quality against size", loc="left")
    _draw_memory(right, config)
    _finish(left, right)
    return figure


def memory_figure(config) -> Figure:
    """Bytes of the cache of one sequence against its length, from the config."""
    figure, axis = figure_and_axes()
    _draw_memory(axis, config)
    _finish(axis)
    return figure


def _draw_memory(axis, config, contexts=(2048, 8192, 32768, 131072), widths=(4, 3, 2)) -> None:
    estimate = Estimate.from_config(config)
    full = [(estimate.full_bytes(n) + estimate.state_bytes) / 1e9 for n in contexts]
    axis.plot(contexts, full, label="bf16", **_style(6))
    for index, nbits in enumerate(widths):
        held = [estimate.memory(n, nbits=nbits).total_bytes / 1e9 for n in contexts]
        axis.plot(contexts, held, label=f"turboquant, {nbits} bits", **_style(index))
    axis.set(xlabel="context (tokens)", ylabel="cache of one sequence (GB)", xscale="log", yscale="log")
    axis.set_xticks(contexts, [f"{n // 1024}k" for n in contexts], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_title("Memory against context", loc="left")


def fidelity_figure(units: dict, settings) -> Figure:
    """Error of the attention's output, layer by layer, at the longest context."""
    figure, axis = figure_and_axes()
    length = max(settings.fidelity_lengths)
    for index, options in enumerate(settings.caches):
        unit = units[f"fidelity: {label(options)}, {length} tokens"]
        axis.plot(unit["layer"], unit["output_error"], label=label(options), **_style(index, markersize=4))
    axis.set(xlabel="layer", ylabel="relative error of attention's output", yscale="log")
    axis.set_title(f"Error by layer, {length:,} tokens", loc="left")
    _finish(axis)
    return figure


def needle_figure(units: dict, settings) -> Figure:
    """Which needles were found: context across, depth down, one panel for each cache."""
    caches = [{"cache": "dynamic"}, *settings.caches]
    columns = min(len(caches), 5)
    rows = -(-len(caches) // columns)
    figure, axes = figure_and_axes(columns, width=1 + 1.9 * columns, height=2.8 * rows, rows=rows)
    for axis in axes[len(caches) :]:
        axis.remove()
    for axis, options in zip(axes, caches, strict=False):
        exact = [
            [units[f"needle: {label(options)}, {n} tokens, depth {depth}"]["exact"] for n in settings.needle_lengths]
            for depth in settings.needle_depths
        ]
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_xticks([n - 0.5 for n in range(1, len(exact[0]))], minor=True)
        axis.set_yticks([n - 0.5 for n in range(1, len(exact))], minor=True)
        axis.grid(True, which="minor", color="w", linewidth=2)
        axis.set_axisbelow(False)
        axis.tick_params(which="both", length=0)
        # dark found, light missed: told apart without colour too, and marked
        axis.imshow(exact, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
        for row, cells in enumerate(exact):
            for column, found in enumerate(cells):
                axis.text(column, row, "✓" if found else "✗", ha="center", va="center", color="w" if found else "k")
        axis.set_xticks(range(len(settings.needle_lengths)), settings.needle_lengths)
        axis.set_yticks(range(len(settings.needle_depths)), [f"{depth:.0%}" for depth in settings.needle_depths])
        axis.set_title(fill(label(options), 22), fontsize=9)
        axis.set_xlabel("context (tokens)", fontsize=9)
    for axis in axes[::columns]:
        axis.set_ylabel("depth of the needle")
    return figure


def _finish(*axes) -> None:
    """Plain numbers along a logarithmic axis, and the legend below, where it hides no line."""
    for axis in axes:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        lines, names = axis.get_legend_handles_labels()
        # what would not fit beside another name gets lines of its own
        names, columns = [fill(name, 60) for name in names], 2 if max(map(len, names)) < 40 else 1
        axis.legend(
            lines, names, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9
        )


def _style(index: int, **more) -> dict:
    # from the eighth line on, colours come again with other marks, on broken lines
    again, turn = index // 7, index % 7
    style = {"color": COLOURS[turn], "marker": MARKS[(turn + again) % 7], "linestyle": "-" if not again else "--"}
    return {**style, "markersize": 6, "linewidth": 1.6, **more}
