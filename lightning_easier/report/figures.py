"""Figures from what a run has logged to TensorBoard (needs matplotlib)."""

from pathlib import Path

from lightning_easier.report.dashboard import ENTROPY_TAG
from lightning_easier.support.storage import replacing


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
    """Draw the entropy of every activation over the run; a curve ends where its activation was made linear.

    Args:
        log_dir: Folder with TensorBoard's event files.
        path: The picture to write.

    Raises:
        ValueError: If the run has logged no entropies.
    """
    from matplotlib.figure import Figure

    curves = read_entropies(log_dir)
    last = max(steps[-1] for steps, _ in curves.values())
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        (line,) = axes.plot(steps, values, linewidth=1.5, label=name.removeprefix("model."))
        if steps[-1] < last:
            axes.plot(steps[-1], values[-1], "o", color=line.get_color(), markersize=5)
    axes.set(xlabel="training step", ylabel="entropy [bit]")
    axes.set_title("Entropy of every activation (a dot: made linear)", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with replacing(path) as new:
        figure.savefig(new, format=Path(path).suffix.removeprefix(".") or "png")
