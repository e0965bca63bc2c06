"""The plots of an evaluation, as PNG files."""

from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..estimate import Estimate
from .caches import rows
from .quality import total

# Okabe and Ito's colours, which colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")


def draw(results, settings, out: Path, config) -> list[Path]:
    """
    Writes the plots for which there are results to `out`: `overview.png` (quality and memory side by side),
    `needle.png` and `fidelity.png`; without an overview, `memory.png`.

    Returns:
        The files.
    """
    figures = {}
    if "quality" in settings.parts:
        figures["overview"] = overview_figure(total(results.units), settings.caches, config)
    else:
        figures["memory"] = memory_figure(config)
    if "needle" in settings.parts:
        figures["needle"] = needle_figure(results.units, settings)
    if "fidelity" in settings.parts:
        figures["fidelity"] = fidelity_figure(results.units, settings)
    paths = {out / f"{name}.png": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        figure.savefig(path, dpi=120)
    return list(paths)


def figure_and_axes(columns: int = 1, width: float = 6.4, height: float = 4.2, rows: int = 1):
    """An empty figure that is independent of pyplot's state, and its axes, row by row."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes if rows * columns > 1 else axes[0]


def overview_figure(qualities: dict, caches: list[dict], config) -> Figure:
    """KL divergence against all bits per coordinate, and bytes against context: low and left is good."""
    lines: dict[str, list] = {}
    for row in rows(caches):
        found = qualities[row.label]
        lines.setdefault(row.line, []).append((found.total_bits, found.kl))
    figure, (left, right) = figure_and_axes(2, width=10, height=4.6 + 0.25 * len(lines))
    for index, points in enumerate(lines.values()):
        left.plot(*zip(*sorted(points), strict=True), **_style(index))
    left.set(xlabel="bits per coordinate, scales included", ylabel="KL to the full cache (nats)", yscale="log")
    left.set_title("Quality against size", loc="left")
    _draw_memory(right, config)
    _number(left, right)
    _legend(figure, dict(zip(lines, left.get_lines(), strict=True)))
    return figure


def memory_figure(config) -> Figure:
    """Bytes of one sequence's cache against its length, from the config."""
    figure, axis = figure_and_axes()
    _draw_memory(axis, config)
    _number(axis)
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
    # Curves that grow with the context leave this corner free.
    axis.legend(loc="upper left", frameon=False, fontsize=9)


def fidelity_figure(units: dict, settings) -> Figure:
    """Error of the attention's output, layer by layer, at the longest context, with a panel for every width."""
    length, found = max(settings.fidelity_lengths), rows(settings.caches)
    # Caches without bits to compare appear in every panel.
    widths = list(dict.fromkeys(row.bits for row in found if row.bits)) or [""]
    names = list(dict.fromkeys(row.line for row in found))
    columns = min(len(widths), 3)
    down = -(-len(widths) // columns)
    size = {"width": 3 + 2.8 * columns, "height": 1 + 3.4 * down + 0.4 * len(names)}
    figure, axes = figure_and_axes(columns, rows=down, **size)
    axes, lines, errors = [axes] if columns == down == 1 else list(axes), {}, []
    for axis in axes[len(widths) :]:
        axis.remove()
    axes = axes[: len(widths)]
    for axis, bits in zip(axes, widths, strict=True):
        for row in (row for row in found if row.bits in (bits, "")):
            unit = units[f"fidelity: {row.label}, {length} tokens"]
            style = {**_style(names.index(row.line)), "markersize": 4}
            lines[row.line] = axis.plot(unit["layer"], unit["output_error"], **style)[0]
            errors += unit["output_error"]
        axis.set(xlabel="layer", yscale="log")
        axis.set_title(f"{bits} bits" if bits else "", loc="left")
    for axis in axes:
        axis.set_ylim(min(errors) / 1.2, max(errors) * 1.2)
    for axis in axes[::columns]:
        axis.set_ylabel("relative error of attention's output")
    figure.suptitle(f"Error by layer, {length:,} tokens", fontsize=12)
    _number(*axes)
    _legend(figure, lines)
    return figure


def needle_figure(units: dict, settings) -> Figure:
    """Which needles were found: context across, depth down, one panel for each cache."""
    found = rows([{"cache": "dynamic"}, *settings.caches])
    lengths, depths = settings.needle_lengths, settings.needle_depths
    columns = min(len(found), 5)
    down = -(-len(found) // columns)
    figure, axes = figure_and_axes(columns, width=1 + 1.9 * columns, height=2.8 * down, rows=down)
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, row in zip(axes, found, strict=False):
        exact = [[units[f"needle: {row.label}, {n} tokens, depth {d}"]["exact"] for n in lengths] for d in depths]
        # Dark means found, light means missed: distinguishable without colour, and marked.
        axis.pcolormesh(exact, cmap="cividis_r", vmin=0, vmax=1, edgecolors="w", linewidth=2)
        axis.invert_yaxis()
        for y, cells in enumerate(exact):
            for x, cell in enumerate(cells):
                mark, colour = ("✓", "w") if cell else ("✗", "k")
                axis.text(x + 0.5, y + 0.5, mark, ha="center", va="center", color=colour)
        axis.set_xticks([x + 0.5 for x in range(len(lengths))], lengths)
        axis.set_yticks([y + 0.5 for y in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        axis.tick_params(length=0)
        axis.set_title("\n".join(fill(text, 26) for text in (row.text, row.head) if text), fontsize=8)
        axis.set_xlabel("context (tokens)", fontsize=9)
    for axis in axes[::columns]:
        axis.set_ylabel("depth of the needle")
    return figure


def _number(*axes) -> None:
    """Plain numbers along a logarithmic axis."""
    for axis in axes:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, lines: dict[str, object]) -> None:
    """Adds one legend of all lines below the axes, where it hides none of them."""
    # Names that would not fit beside another one get their own rows.
    width = int(figure.get_figwidth() * 6)
    columns = max(1, min(3, 2 * width // (max(map(len, lines)) + 8)))
    texts = [fill(text, 2 * width // columns - 8) for text in lines]
    options = {"ncols": columns, "frameon": False, "fontsize": 9, "handlelength": 4}
    figure.legend(list(lines.values()), texts, loc="outside lower center", **options)


def _style(index: int) -> dict:
    """A colour, a marker and dashes: 28 lines are distinct, the first seven by colour alone."""
    turn, again = index % 7, index // 7
    style = {"color": COLOURS[turn], "marker": MARKS[(turn + again) % 7], "linestyle": DASHES[again % 4]}
    return {**style, "markersize": 6, "linewidth": 1.6}
