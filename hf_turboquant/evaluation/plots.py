"""The plots of an evaluation, as PNG files."""

from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..estimate import Estimate
from .caches import label
from .names import BY_BITS, Name, names
from .quality import total

# Okabe and Ito's colours, which colour-blind people tell apart; marks differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "osD^vPX"
# of caches that differ in more than method and bits; every second one is hollow
DASHES = ("-", "--", ":", "-.")
# a row of a legend: without any character it would be lower than the others
NOTHING = "\u00a0"
# so many lines are told apart by colour alone
FEW = 7


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
    lines: dict[tuple, list] = {}
    for name, options in zip(names(caches), caches, strict=True):
        found = qualities[label(options)]
        lines.setdefault((name.head, name.line), []).append((found.total_bits, found.kl))
    many = len(lines) > FEW
    figure, (left, right) = figure_and_axes(2, width=10, height=6.6 if many else 4.2)
    styles = _styles(names(caches))
    for key, points in lines.items():
        left.plot(*zip(*sorted(points), strict=True), label=_whole(*key), **styles[key])
    left.set(xlabel="bits per coordinate, scales included", ylabel="KL to the full cache (nats)", yscale="log")
    left.set_title("Quality against size", loc="left")
    _draw_memory(right, config)
    _number(left, right)
    if many:
        _legend_of_groups(figure, dict(zip(lines, left.get_lines(), strict=True)))
        # what grows with the context leaves this corner free
        right.legend(loc="upper left", frameon=False, fontsize=9)
    else:
        _legend(left)
        _legend(right)
    return figure


def memory_figure(config) -> Figure:
    """Bytes of the cache of one sequence against its length, from the config."""
    figure, axis = figure_and_axes()
    _draw_memory(axis, config)
    _number(axis)
    _legend(axis)
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
    """Error of the attention's output, layer by layer, at the longest context; many caches in a panel per width."""
    length = max(settings.fidelity_lengths)
    caches = list(zip(names(settings.caches), settings.caches, strict=True))
    many = len(caches) > FEW
    # what has no bits to compare stands beside all that has
    widths = list(dict.fromkeys(name.bits for name, _ in caches if name.bits)) or [()]
    panels = {f"{'/'.join(map(str, bits))} bits": [c for c in caches if c[0].bits in (bits, ())] for bits in widths}
    if not many:
        panels = {f"Error by layer, {length:,} tokens": caches}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = {"width": 1 + 3.4 * columns, "height": 2.4 + 3.2 * rows} if many else {}
    figure, axes = figure_and_axes(columns, rows=rows, **size)
    axes = [axes] if len(panels) == 1 else list(axes)
    for axis in axes[len(panels) :]:
        axis.remove()
    styles, lines, errors = _styles(names(settings.caches)), {}, []
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for index, (name, options) in enumerate(members):
            unit, key = units[f"fidelity: {label(options)}, {length} tokens"], (name.head, name.line)
            style = styles[key] if many else _style(index)
            (line,) = axis.plot(
                unit["layer"], unit["output_error"], label=_whole(name.head, name.row), **{**style, "markersize": 4}
            )
            lines.setdefault(key, line)
            errors += unit["output_error"]
        axis.set(xlabel="layer", yscale="log")
        axis.set_title(title, loc="left")
    for axis in axes[: len(panels)]:
        axis.set_ylim(min(errors) / 1.2, max(errors) * 1.2)
    for axis in axes[::columns]:
        axis.set_ylabel("relative error of attention's output")
    _number(*axes[: len(panels)])
    if many:
        figure.suptitle(f"Error by layer, {length:,} tokens", fontsize=12)
        _legend_of_groups(figure, lines)
    else:
        _legend(axes[0])
    return figure


def needle_figure(units: dict, settings) -> Figure:
    """Which needles were found: context across, depth down, one panel for each cache."""
    caches = [{"cache": "dynamic"}, *settings.caches]
    columns = min(len(caches), 5)
    rows = -(-len(caches) // columns)
    figure, axes = figure_and_axes(columns, width=1 + 1.9 * columns, height=2.8 * rows, rows=rows)
    for axis in axes[len(caches) :]:
        axis.remove()
    for axis, options, name in zip(axes, caches, names(caches), strict=False):
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
        axis.set_title("\n".join([fill(name.row, 24), *filter(None, [fill(name.head, 30)])]), fontsize=8)
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


def _whole(head: str, text: str) -> str:
    """Head and name of a line as one text."""
    return ", ".join(part for part in (head, "" if text == BY_BITS and head else text) if part)


def _legend(axis) -> None:
    """The legend below, where it hides no line."""
    lines, texts = axis.get_legend_handles_labels()
    # what would not fit beside another name gets lines of its own
    texts, columns = [fill(text, 60) for text in texts], 2 if max(map(len, texts)) < 40 else 1
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": columns}
    axis.legend(lines, texts, frameon=False, fontsize=9, **options)


def _legend_of_groups(figure: Figure, lines: dict[tuple[str, str], object]) -> None:
    """
    One legend below everything: what a group of caches shares stands once, above its lines.

    Args:
        lines (`dict`): what was drawn, by head and name of the line.
    """
    groups: dict[str, list] = {}
    for (head, text), line in lines.items():
        groups.setdefault(head, []).append((line, fill(text, 34)))
    blank = Line2D([], [], linestyle="none")
    blocks = []
    heads = {head: fill(head, 34).split("\n") if head else [] for head in groups}
    tall = max(map(len, heads.values()))
    # what has no head may be cut, so that it is not much longer than the rest
    longest = max((len(entries) for head, entries in groups.items() if head), default=4)
    for head, entries in groups.items():
        step = len(entries) if head else max(longest, 4)
        # heads of as many rows each: columns begin at one height
        title = [(blank, text) for text in [NOTHING] * (tall - len(heads[head])) + heads[head]]
        blocks += [title + entries[start : start + step] for start in range(0, len(entries), step)]
    columns: list[list] = [[] for _ in range(min(len(blocks), 3))]
    for block in blocks:
        min(columns, key=len).extend(block)
    # a legend fills its columns evenly: the same number in each keeps groups together
    length = max(map(len, columns))
    entries = [entry for column in columns for entry in column + [(blank, NOTHING)] * (length - len(column))]
    legend = figure.legend(
        *zip(*entries, strict=True),
        loc="outside lower center",
        ncols=len(columns),
        frameon=False,
        fontsize=9,
        handlelength=4,
    )
    for (line, _), text in zip(entries, legend.get_texts(), strict=True):
        text.set_color("#555555" if line is blank else "black")


def _styles(found: list[Name]) -> dict[tuple[str, str], dict]:
    """Looks of lines by head and name: a colour for each of a few, else for each method, and dashes."""
    lines = {(name.head, name.line): name for name in found}
    if len(lines) <= FEW:
        return {key: _style(index) for index, key in enumerate(lines)}
    methods = list(dict.fromkeys(name.method for name in lines.values()))
    settings = list(dict.fromkeys(name.setting for name in lines.values()))
    styles = {}
    for key, name in lines.items():
        turn = settings.index(name.setting)
        more = {"markerfacecolor": "white"} if turn % 2 else {}
        styles[key] = {**_style(methods.index(name.method)), "linestyle": DASHES[turn % len(DASHES)], **more}
    return styles


def _style(index: int, **more) -> dict:
    # from the eighth on, colours come again with other marks
    again, turn = index // 7, index % 7
    style = {"color": COLOURS[turn], "marker": MARKS[(turn + again) % 7], "linestyle": "-" if not again else "--"}
    return {**style, "markersize": 6, "linewidth": 1.6, **more}
