"""The demo's plot: losses, times and memory, with plain torch and with the fast ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"reference": "#888888", "fast": "#c44e52"}
LABELS = {"reference": "plain torch", "fast": "fast ops"}


def plot(trained: dict[str, Any], inference: list[dict[str, Any]], path: Path) -> None:
    """Draws the losses of both runs, and bars of time and memory, into the PNG file `path`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses, times, memory = figure.subplots(1, 3, width_ratios=(4, 4, 1.6))

    for ops, style in (("reference", "-"), ("fast", "--")):
        steps, count = trained[ops]["losses"], len(trained[ops]["epoch_seconds"])
        length = len(steps) // count
        means = [sum(steps[i * length : (i + 1) * length]) / length for i in range(count)]
        label = f"{LABELS[ops]}, test accuracy {trained[ops]['test_accuracy']:.1%}"
        losses.plot(steps, color=COLORS[ops], linewidth=0.6, alpha=0.35)
        middles = [(i + 0.5) * length for i in range(count)]
        losses.plot(middles, means, style, color=COLORS[ops], label=label, linewidth=2.2)
    losses.set(
        title="small CNN on real digits", xlabel="step", ylabel="training loss, epoch's mean"
    )
    losses.set_yscale("log")
    losses.legend()

    epochs = {ops: 1e3 * run["median_epoch_seconds"] for ops, run in trained.items()}
    groups = [("training,\none epoch", epochs)]
    groups += [
        (
            f"{row['model']}\n{row['batch']} image" + ("s" if row["batch"] > 1 else ""),
            {"reference": row["baselines_ms"]["eager nchw"], "fast": row["median_ms"]},
        )
        for row in inference
    ]
    _bars(times, groups, "{:.0f}")
    times.set(title="time", ylabel="share of plain torch's (ms on the bars)")

    saved = {ops: run["saved_for_backward_bytes"] / 1e6 for ops, run in trained.items()}
    _bars(memory, [("training,\na batch", saved)], "{:.1f}")
    memory.set(title="saved for backward", ylabel="share of plain torch's (MB)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, groups: list[tuple[str, dict[str, float]]], number: str) -> None:
    """A pair of bars a group, as shares of plain torch's value, with the values on them."""
    for shift, ops in ((-0.2, "reference"), (0.2, "fast")):
        shares = [values[ops] / values["reference"] for _, values in groups]
        places = [index + shift for index in range(len(groups))]
        bars = axes.bar(places, shares, 0.38, color=COLORS[ops], label=LABELS[ops])
        axes.bar_label(bars, [number.format(values[ops]) for _, values in groups], fontsize=8)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups], fontsize=8)
    axes.set_ylim(0, 1.25 * max(axes.get_ylim()[1], 1.0))
    axes.legend(fontsize=8, loc="upper center", ncols=2 if len(groups) > 1 else 1)
