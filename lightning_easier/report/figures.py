"""Pictures of plain results, by matplotlib: entropies, rounds, scores against time, and where the time goes."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from math import ceil, inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_easier.report.layout import shorten_all
from lightning_easier.support.storage import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEPT, _TAKEN_BACK, _BEFORE, _AFTER, _GREY = "#1f6fb4", "#c8443a", "#9aa5b1", "#1f6fb4", "#d7dade"
_LINES = ("-", "--", ":", "-.")
_LETTERS = 30  # of a name beside a picture
_MOST_BARS = 30
_MOST_BESIDE, _COLUMNS = 18, 5  # names in a legend; of more there are so many columns below
_MOST_LABELS = 8
_MOST_NUMBERS = 240  # a map of more cells is colours alone

Draw = Callable[[Any], None]
"""Draws into axes."""


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_figure(panels: Sequence[tuple[Draw, float]], width: float = 9.0) -> "Figure":
    """Draw panels one below the other.

    Args:
        panels: What draws each, and how high it is, in inches.
        width: In inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not can_draw():
        raise ModuleNotFoundError(
            "Figures need matplotlib: `pip install 'lightning-easier[figures]'` or `pip install matplotlib`",
            name="matplotlib",
        )
    from matplotlib.figure import Figure  # not pyplot: no window, no state, and any thread may draw

    heights = [height for _, height in panels]
    figure = Figure(figsize=(width, sum(heights)), dpi=110, layout="constrained", facecolor="white")
    every = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (draw, _) in zip(every, panels, strict=True):  # each with a layout of its own: names differ in length
        draw(part.subplots())
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure to a file, whole or not at all.

    Args:
        figure: The figure.
        path: Its suffix tells the format: ``.png``, ``.svg``, ``.pdf``; PNG without one.
    """
    with replacing(path) as new:
        figure.savefig(new, format=Path(path).suffix.removeprefix(".") or "png")


def curves_of_entropy(
    curves: Mapping[str, Mapping[float, float]], begins: Mapping[int, float], linear: Mapping[str, float], step: str
) -> tuple[Draw, float]:
    """Draw the entropy of every activation over a run.

    Args:
        curves: Name -> place on the axis -> entropy in bits, in the order of the network.
        begins: Number of a round -> where it began.
        linear: Name of what is linear at the end -> where its curve ends.
        step: What the axis counts.
    """
    names = shorten_all(_without_common_beginning([*curves]), _LETTERS)
    is_beside = len(curves) <= _MOST_BESIDE

    def draw(axes: Any) -> None:
        from matplotlib import colormaps

        places = sorted({place for curve in curves.values() for place in curve})
        marker = "o" if len(places) == 1 else None
        for number, (curve, name) in enumerate(zip(curves.values(), names, strict=True)):
            colour = colormaps["turbo"](0.04 + 0.92 * number / max(len(curves) - 1, 1))
            values = [curve.get(place, nan) for place in places]
            line = _LINES[number % len(_LINES)] if len(curves) > 8 else "-"
            axes.plot(places, values, line, color=colour, linewidth=1.5, label=name, marker=marker)
        for number, (name, curve) in enumerate(curves.items()):
            if name in linear and linear[name] in curve:
                colour = colormaps["turbo"](0.04 + 0.92 * number / max(len(curves) - 1, 1))
                axes.plot(linear[name], curve[linear[name]], "o", color=colour, markersize=7, markeredgecolor="black")
        for number, place in begins.items():
            if number:
                axes.axvline(place, color=_GREY, linewidth=1, zorder=0)
        axes.set(xlabel=step, ylabel="entropy [bit]")
        lines = ", a line: a round begins" if len(begins) > 1 else ""
        _title(axes, f"Entropy of every activation (a dot: made linear{lines})")
        axes.figure.legend(
            loc="outside right upper" if is_beside else "outside lower center", ncols=1 if is_beside else _COLUMNS,
            title="in the order of the network", title_fontsize=7, fontsize=7, frameon=False, alignment="left",
        )  # fmt: skip

    return draw, 3.4 if is_beside else 3.6 + 0.16 * ceil(len(curves) / _COLUMNS)


def map_of_rounds(
    entropies: Mapping[str, Sequence[float | None]], rounds: Sequence[str], taken_back: Sequence[bool]
) -> tuple[Draw, float]:
    """Draw the entropies of all activations in all rounds: a row each, in the order of the network.

    Args:
        entropies: Name -> entropy in bits at the end of each round; None where it was linear or not measured.
        rounds: What to call each round.
        taken_back: Whether each was taken back.
    """
    names = shorten_all(_without_common_beginning([*entropies]), _LETTERS)

    def draw(axes: Any) -> None:
        from matplotlib import colormaps

        rows = [[nan if value is None else value for value in row] for row in entropies.values()]
        highest = max([1.0, *(value for row in rows for value in row if value == value)])
        colours = colormaps["viridis"].with_extremes(bad=_GREY)
        image = axes.imshow(rows, aspect="auto", cmap=colours, vmin=0, vmax=highest, interpolation="nearest")
        if len(rows) * len(rounds) <= _MOST_NUMBERS and len(rounds) <= 16:
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    text = f"{value:.2f}" if value == value else "–"
                    dark = value == value and value < 0.6 * highest
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_yticks(range(len(names)), names, fontsize=7)
        every = ceil(len(rounds) / 24)
        axes.set_xticks(range(0, len(rounds), every), rounds[::every], fontsize=8)
        for label, is_back in zip(axes.get_xticklabels(), taken_back[::every], strict=True):
            label.set_color(_TAKEN_BACK if is_back else "black")
        axes.set_xlabel("round (red: taken back)")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes, pad=0.01).set_label("bit", fontsize=8)
        _title(axes, "Entropy at the end of each round (grey: linear)")

    return draw, 1.1 + 0.19 * len(entropies)


def scores_by_removals(points: Sequence[tuple[int, float, bool]], score: str) -> tuple[Draw, float]:
    """Draw the score against how much is removed.

    Args:
        points: How much, the score, and whether the round was kept, in the order of the rounds.
        score: Its name.
    """

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        kept = [point for point in points if point[2]]
        back = [point for point in points if not point[2]]
        axes.plot([p[0] for p in kept], [p[1] for p in kept], "o-", color=_KEPT, label="kept")
        if back:
            axes.plot([p[0] for p in back], [p[1] for p in back], "x", color=_TAKEN_BACK, label="taken back", mew=2)
        axes.set(xlabel="removed", ylabel=score)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(fontsize=8, frameon=False)
        _title(axes, f"{score} against what is removed")

    return draw, 2.8


def scores_by_time(
    points: Mapping[str, tuple[float, float]], score: str, time: str, *, higher_is_better: bool = True
) -> tuple[Draw, float]:
    """Draw scores against times, and the Pareto front: no other is as fast and better, or as good and faster.

    Args:
        points: Name -> time and score.
        score: Its name.
        time: What the times are, with their unit.
        higher_is_better: Whether a higher score is the better one.
    """
    front = pareto_front(points, higher_is_better=higher_is_better)

    def draw(axes: Any) -> None:
        line = [points[name] for name in front]
        axes.plot([x for x, _ in line], [y for _, y in line], "-", color=_KEPT, linewidth=1, alpha=0.6, zorder=1)
        for name, point in points.items():
            on_front = name in front
            axes.plot(*point, "o" if on_front else "x", color=_KEPT if on_front else "#6b7683", markersize=6, zorder=2)
        every = ceil(len(points) / _MOST_LABELS)
        labelled = {name: point for number, (name, point) in enumerate(points.items()) if number % every == 0}
        for name, above in _levels(labelled).items():
            axes.annotate(name, points[name], xytext=(6, 4 + 9 * above), textcoords="offset points", fontsize=7)
        axes.margins(x=0.15, y=0.3)
        axes.set(xlabel=time, ylabel=score)
        _title(axes, f"{score} against measured time (line: the Pareto front)")

    return draw, 3.0


def _levels(points: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    """Return how many names are below each, where points are so near to each other that names would overlap."""
    spans = [max(values) - min(values) or 1.0 for values in zip(*points.values(), strict=True)]
    levels: dict[str, int] = {}
    for name, point in points.items():
        near = [
            level
            for other, level in levels.items()
            if all(
                abs(a - b) / span < room
                for a, b, span, room in zip(point, points[other], spans, (0.2, 0.1), strict=True)
            )
        ]
        levels[name] = next(level for level in range(len(points)) if level not in near)
    return levels


def pareto_front(points: Mapping[str, tuple[float, float]], *, higher_is_better: bool = True) -> list[str]:
    """Return the names of the points that no other beats, the fastest first.

    Args:
        points: Name -> time and score.
        higher_is_better: Whether a higher score is the better one.

    Example:
        >>> pareto_front({"dense": (4.0, 0.9), "small": (2.0, 0.8), "bad": (3.0, 0.7)})
        ['small', 'dense']
    """
    sign = 1 if higher_is_better else -1
    best, front = -inf, []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * score > best:
            best = sign * score
            front.append(name)
    return front


def bars_of_operators(times: Mapping[str, tuple[float | None, float | None]]) -> tuple[Draw, float]:
    """Draw where the time went and goes: two bars an operator, in the order of the network.

    Args:
        times: Name -> seconds before and after; None where there is no such operator.
    """
    shown, others = _largest(times, _MOST_BARS)
    names = shorten_all(_without_common_beginning([*shown]), _LETTERS)
    if others:
        names.append(f"{len(times) - len(shown)} others")
    values = [*shown.values(), *([others] if others else [])]
    totals = [sum(pair[place] or 0.0 for pair in times.values()) * 1e3 for place in (0, 1)]

    def draw(axes: Any) -> None:
        for place, (label, colour) in enumerate((("before", _BEFORE), ("after", _AFTER))):
            at = [row + (place - 0.5) * 0.4 for row in range(len(values))]
            widths = [(pair[place] or 0.0) * 1e6 for pair in values]
            axes.barh(at, widths, height=0.4, color=colour, label=f"{label}: {totals[place]:.3g} ms in all")
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("µs of one call")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        _title(axes, "Where the time went, in the dense network and after the collapse")
        axes.grid(axis="y", visible=False)

    return draw, 1.2 + 0.2 * len(values)


def _largest(
    times: Mapping[str, tuple[float | None, float | None]], most: int
) -> tuple[dict[str, tuple[float | None, float | None]], tuple[float, float] | None]:
    """Return the operators that take most, in their order, and what the others take together."""
    if len(times) <= most:
        return dict(times), None
    by_time = sorted(times, key=lambda name: max(value or 0.0 for value in times[name]), reverse=True)
    chosen = set(by_time[: most - 1])
    rest = [pair for name, pair in times.items() if name not in chosen]
    together = sum(pair[0] or 0.0 for pair in rest), sum(pair[1] or 0.0 for pair in rest)
    return {name: pair for name, pair in times.items() if name in chosen}, together


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if not axes.images:
        axes.grid(alpha=0.25)


def _without_common_beginning(names: Sequence[str]) -> list[str]:
    """Leave out the modules that all names begin with: `model.` of a LightningModule."""
    parts = [name.split(".") for name in names if "." in name]  # others are functions
    common = 0
    while len(parts) > 1 and all(len(each) > common + 1 for each in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    short = [".".join(name.split(".")[common:]) if "." in name else name for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def read_entropies(log_dir: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read the entropy curves of a run.

    Args:
        log_dir: Folder with TensorBoard's event files.

    Returns:
        Name of the activation -> (steps, entropies in bits), in the order of first appearance. Steps rise; where one
        was logged twice, by a run that was taken up, the later value counts.

    Raises:
        ValueError: If the run has logged no entropies.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lightning_easier.report.dashboard import ENTROPY_TAG

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"{ENTROPY_TAG}/")]
    if not tags:
        raise ValueError(f"Expected argument `log_dir` to hold a run that has logged entropies, but {log_dir} does not")
    curves = {}
    for tag in tags:
        # A run that is taken up writes a file of its own, with steps that the first has seen
        latest = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        curves[tag.removeprefix(f"{ENTROPY_TAG}/")] = sorted(latest), [latest[step] for step in sorted(latest)]
    return curves


def plot_entropies(log_dir: str | Path, path: str | Path) -> None:
    """Draw the entropy of every activation over a run that is only known from its logs.

    Args:
        log_dir: Folder with TensorBoard's event files.
        path: The picture to write.

    Raises:
        ValueError: If the run has logged no entropies.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    found = {
        name: {float(step): value for step, value in zip(steps, values, strict=True)}
        for name, (steps, values) in read_entropies(log_dir).items()
    }
    last = max(max(curve) for curve in found.values())
    linear = {name: max(curve) for name, curve in found.items() if max(curve) < last}
    save_figure(new_figure([curves_of_entropy(found, {}, linear, "training step")]), path)
