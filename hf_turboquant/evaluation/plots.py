"""The plots of an evaluation."""

from textwrap import fill

import matplotlib
from matplotlib import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..estimate import Estimate
from .caches import label, lines

# Okabe and Ito's colours, which colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "osD^vPX"
# Of 28 distinct lines, the first seven by colour alone; called, it starts anew.
STYLES = cycler(linestyle=("-", "--", ":", "-.")) * (cycler(color=COLOURS) + cycler(marker=list(MARKS)))


def figure_and_axes(columns: int = 1, width: float = 6.4, height: float = 4.2, **options):
    """An empty figure that is independent of pyplot's state, and its axes; `options` are those of `subplots`."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    style |= {"axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, columns, **options)


def overview_figure(qualities: dict, caches: list[dict], config) -> Figure:
    """KL divergence against all bits per coordinate, and bytes against context: low and left is good."""
    found = lines(caches)
    figure, (left, right) = figure_and_axes(2, width=10, height=4.6 + 0.25 * len(found))
    for style, (name, members) in zip(STYLES(), found.items(), strict=False):
        points = sorted((q.total_bits, q.kl) for q in (qualities[label(options)] for options in members))
        left.plot(*zip(*points, strict=True), label=name, **style)
    left.set(xlabel="bits per coordinate, scales included", ylabel="KL to the full cache (nats)", yscale="log")
    left.set_title("Quality against size", loc="left")
    draw_memory(right, config)
    _number(left)
    _legend(figure, left)
    return figure


def draw_memory(axis, config, contexts=(2048, 8192, 32768, 131072), widths=(4, 3, 2)) -> None:
    """Bytes of one sequence's cache against its length, from the config."""
    estimate = Estimate.from_config(config)
    for style, nbits in zip(STYLES(), widths, strict=False):
        held = [estimate.memory(n, nbits=nbits).total_bytes / 1e9 for n in contexts]
        axis.plot(contexts, held, label=f"turboquant, {nbits} bits", **style)
    full = [(estimate.full_bytes(n) + estimate.state_bytes) / 1e9 for n in contexts]
    axis.plot(contexts, full, label="bf16", color=COLOURS[6], marker=MARKS[6])
    axis.set(xlabel="context (tokens)", ylabel="cache of one sequence (GB)", xscale="log", yscale="log")
    axis.set_xticks(contexts, [f"{n // 1024}k" for n in contexts], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_title("Memory against context", loc="left")
    # Curves that grow with the context leave this corner free.
    axis.legend(loc="upper left", frameon=False, fontsize=9)
    _number(axis)


def fidelity_figure(units: dict[str, dict], title: str) -> Figure:
    """Error of the attention's output by layer, a line for each cache; `units` are results of that part by name."""
    figure, axis = figure_and_axes(width=7, height=4 + 0.25 * len(units))
    for style, (name, unit) in zip(STYLES(), units.items(), strict=False):
        axis.plot(unit["layer"], unit["output_error"], label=name, markersize=4, **style)
    axis.set(xlabel="layer", ylabel="relative error of attention's output", yscale="log")
    axis.set_title(title, loc="left")
    _number(axis)
    _legend(figure, axis)
    return figure


def _number(axis) -> None:
    """Plain numbers along a logarithmic axis."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def _legend(figure: Figure, axis) -> None:
    """Adds a legend of the lines of `axis` below the axes, where it hides none of them."""
    texts = [fill(line.get_label(), int(figure.get_figwidth() * 12) - 8) for line in axis.get_lines()]
    figure.legend(axis.get_lines(), texts, loc="outside lower center", frameon=False, fontsize=9, handlelength=4)
