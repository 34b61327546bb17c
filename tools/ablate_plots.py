"""The picture of an ablation: held-out loss of each overlay and seed, and by window length or during training."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ablate_table
import scaling_plots
from ablate_table import Result


def plot(results: Mapping[str, Sequence[Result]], path: str) -> None:
    """Left: loss at the end. Right: loss by length of the windows if that was measured, else during training. Overlays
    without a result are left out."""
    results = {name: found for name, found in results.items() if found}
    pyplot = scaling_plots.pyplot()
    figure, (ends, curves) = pyplot.subplots(
        1, 2, figsize=(5.0 + 0.7 * len(results) + 5.4, 4.4), layout="constrained",
        width_ratios=(2.2 + 0.7 * len(results), 5.4),
    )  # fmt: skip
    for axis in (ends, curves):
        axis.grid(True, which="major", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    colours = [f"C{number % 10}" for number in range(len(results))]
    _ends(ends, results, colours)
    by_length = next(iter(results.values()))[0].lengths is not None
    for (name, found), colour in zip(results.items(), colours, strict=True):
        for number, each in enumerate(found):
            points = _by_length(each) if by_length else each.curve[1:] or each.curve
            label = name if number == 0 else None
            curves.plot(
                *zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.2, alpha=0.8, label=label
            )  # fmt: skip
    if by_length:
        _length_axis(curves, next(iter(results.values()))[0])
    else:
        curves.set(xlabel="tokens", title="During training")
    curves.set_ylabel("held-out loss (nats a token)")
    curves.legend(frameon=False)
    scaling_plots.save(figure, path)


def _ends(axis: Any, results: Mapping[str, Sequence[Result]], colours: Sequence[str]) -> None:
    for place, (found, colour) in enumerate(zip(results.values(), colours, strict=True)):
        losses = [each.loss for each in found]
        axis.plot([place] * len(losses), losses, "o", color=colour, markersize=5, zorder=3)
        mean = statistics.fmean(losses)
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        axis.errorbar(
            place + 0.18, mean, yerr=deviation, fmt="_", color=colour, markersize=14, capsize=4
        )
    axis.set_xticks(range(len(results)), list(results))
    axis.set(
        xlim=(-0.5, len(results) - 0.3), ylabel="held-out loss (nats a token)",
        title="At the end: seeds, mean ± deviation",
    )  # fmt: skip
    if max(map(len, results)) * len(results) > 40:
        axis.tick_params(axis="x", rotation=40)


def _by_length(result: Result) -> list[tuple[int, float]]:
    assert result.lengths
    found = [(int(t), ablate_table.loss_at(result, t)) for t in result.lengths["lengths"]]
    return [(tokens, loss) for tokens, loss in found if loss is not None]


def _length_axis(axis: Any, result: Result) -> None:
    assert result.lengths
    lengths = [int(tokens) for tokens in result.lengths["lengths"]]
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(tokens) for tokens in lengths])
    axis.minorticks_off()
    axis.axvline(result.lengths["training_length"], color="black", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="tokens of a window (dotted: of training)", title="The same text in longer windows"
    )
