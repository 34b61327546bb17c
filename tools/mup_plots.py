"""Pictures of muP: coordinates by width, and loss by learning rate at each width."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scaling_plots
from scaling_plots import check_path

__all__ = ["check_path", "plot_coordinates", "plot_transfer"]
_TITLES = {"sp": "standard", "sp_fan_in": "standard, init 1/sqrt(width)", "mup": "muP"}


def _grid(num_rows: int, num_columns: int, size: tuple[float, float], **options) -> tuple[Any, Any]:
    pyplot = scaling_plots.pyplot()
    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=(size[0] * num_columns, size[1] * num_rows),
        layout="constrained", squeeze=False, **options,
    )  # fmt: skip
    for axis in axes.flat:
        axis.grid(True, which="major", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shades(num: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](np.linspace(0, 0.85, num))


def plot_coordinates(checks: Sequence[Any], kinds: Sequence[str], path: str) -> None:
    """A row a parametrization, a column a kind: the change since the start by width, a line a step."""
    figure, axes = _grid(len(checks), len(kinds), (2.3, 2.4), sharex=True, sharey="col")
    for row, check in zip(axes, checks, strict=True):
        num_steps = check.change.shape[1] - 1
        slopes = check.slopes("change")
        for number, (axis, kind) in enumerate(zip(row, kinds, strict=True)):
            for step, colour in zip(range(1, num_steps + 1), _shades(num_steps), strict=True):
                axis.plot(
                    check.widths, check.change[:, step, number], "o-", color=colour, markersize=3,
                    linewidth=1.2, label=f"step {step}",
                )  # fmt: skip
            axis.set(xscale="log", yscale="log", title=f"{kind}  ~ width^{slopes[kind]:+.2f}")
            axis.set_xticks(check.widths, [str(width) for width in check.widths])
            axis.minorticks_off()
            axis.title.set_fontsize(9)
            axis.tick_params(labelsize=8)
        title = _TITLES[check.parametrization]
        row[0].set_ylabel(f"{title}\nmean |x_t - x_0|", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("width", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    scaling_plots.save(figure, path)


def plot_transfer(sweeps: Sequence[Any], path: str) -> None:
    """A panel a parametrization: loss by learning rate, a line a width, its best marked."""
    figure, axes = _grid(1, len(sweeps), (5.2, 4.2), sharey=True)
    largest = max(float(np.nanmin(sweep.losses[0])) for sweep in sweeps)
    smallest = min(float(np.nanmin(sweep.losses)) for sweep in sweeps)
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        colours = _shades(len(sweep.widths))
        for width, row, colour in zip(sweep.widths, sweep.losses, colours, strict=True):
            axis.plot(
                sweep.rates, row, "o-", color=colour, markersize=3, linewidth=1.2, label=width
            )
            best = int(np.nanargmin(row))
            axis.plot(sweep.rates[best], row[best], "*", markersize=13, color="tab:red", zorder=4)
        axis.set_xscale("log", base=2)
        axis.set(
            xlabel="learning rate", title=_TITLES[sweep.parametrization],
            ylim=(smallest - 0.1 * (largest - smallest), largest + 2 * (largest - smallest)),
        )  # fmt: skip
    axes[0][0].set_ylabel("loss (nats a token)")
    axes[0][0].legend(frameon=False, title="width", fontsize=8)
    scaling_plots.save(figure, path)
