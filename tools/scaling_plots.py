"""Pictures of scaling laws: loss against compute, isoFLOP parabolas, residuals, a run against its prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.loss_curves import Verdict
from bloomjax.scaling_fits import Fit
from bloomjax.scaling_laws import FLOPS_PER_PARAM_TOKEN, KaplanLaw, ParametricLaw
from bloomjax.scaling_runs import Curve, Runs, final_runs

_FORMATS = (".png", ".svg", ".pdf")


def pyplot() -> Any:
    """matplotlib's, for files. BadInput if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput(f"--plot needs matplotlib: pip install 'bloomjax[plot]' ({error})") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def _figure(num_panels: int) -> tuple[Any, list[Any]]:
    figure, axes = pyplot().subplots(
        1, num_panels, figsize=(6.4 * num_panels, 4.8), layout="constrained", squeeze=False
    )
    for axis in axes[0]:
        axis.grid(True, which="major", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def check_path(path: str) -> None:
    """BadInput for a picture that could not be written, before anything is computed."""
    if Path(path).suffix not in _FORMATS:
        raise BadInput(f"--plot={path}: pictures end in {', '.join(_FORMATS)}")
    if not Path(path).resolve().parent.is_dir():
        raise BadInput(f"--plot={path}: there is no folder {Path(path).parent}")


def save(figure: Any, path: str) -> None:
    """Writes the picture beside, renames it, forgets it."""
    beside = Path(path).with_name(f".{Path(path).name}{Path(path).suffix}")
    figure.savefig(beside, dpi=110)
    beside.rename(path)
    pyplot().close(figure)


def _colours(values: np.ndarray) -> tuple[Any, Any]:
    """Colour of each of `values`, by its logarithm, and the mappable of the colour bar."""
    from matplotlib import cm, colormaps, colors

    low, high = float(values.min()), float(values.max())
    norm = colors.LogNorm(low, high if high > low else low * 1.01)
    # Without its last, yellow part, which is hard to see on white.
    shades = colors.ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 64)))
    mappable = cm.ScalarMappable(norm, shades)
    return mappable.to_rgba(values), mappable


def plot_fit(fit: Fit, curves: Sequence[Curve], path: str) -> None:
    """1: envelope; 2: parabolas, each with the best sizes; 3 and kaplan: loss against compute, and residuals."""
    figure, axes = _figure(2)
    runs = final_runs(curves)
    if fit.approach == "1":
        _envelope(axes[0], fit, curves)
        _best_sizes(axes[1], fit)
    elif fit.approach == "2":
        _parabolas(axes[0], fit, runs)
        _best_sizes(axes[1], fit)
    else:
        _loss_by_compute(axes[0], fit, curves)
        _residuals(axes[1], fit, runs)
    save(figure, path)


def _loss_by_compute(axis: Any, fit: Fit, curves: Sequence[Curve]) -> None:
    runs = final_runs(curves)
    law = fit.law
    assert isinstance(law, ParametricLaw | KaplanLaw)
    colours, mappable = _colours(runs.params)
    for curve, colour in zip(curves, colours, strict=True):
        if len(curve.tokens) > 1:
            flops = FLOPS_PER_PARAM_TOKEN * curve.params * curve.tokens
            axis.plot(flops, curve.loss, color=colour, linewidth=0.6, alpha=0.5)
    axis.scatter(runs.flops, runs.loss, c=colours, s=18, zorder=3, label="runs")
    line = np.geomspace(runs.flops.min() / 2, runs.flops.max() * 10, 100)
    lowest = float(runs.loss.min())
    try:
        best = np.array([law.optimum(flops).loss for flops in line])
    except BadInput:  # a degenerate law has no best size
        pass
    else:
        ends = [fit.interval_of(lambda each, c=c: each.optimum(c).loss) for c in line]
        axis.fill_between(line, *np.array(ends).T, color="tab:red", alpha=0.15, linewidth=0)
        label = "best size for the budget, by the law"
        axis.plot(line, best, color="tab:red", linewidth=1.5, label=label)
        lowest = min(lowest, float(best.min()))
    spread = runs.loss.max() - runs.loss.min()
    axis.set(
        xscale="log", xlabel="compute 6ND (FLOPs)", ylabel="loss (nats a token)",
        xlim=(line[0] / 5, line[-1] * 2), ylim=(lowest - 0.1 * spread, runs.loss.max() + 0.15 * spread),
        title=f"Loss by compute, approach {fit.approach}: {fit.num_runs} runs",
    )  # fmt: skip
    axis.legend(frameon=False)
    axis.figure.colorbar(mappable, ax=axis, label="parameters")


def _residuals(axis: Any, fit: Fit, runs: Runs) -> None:
    colours, mappable = _colours(runs.params)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.scatter(runs.tokens, 100 * fit.residuals, c=colours, s=18)
    largest = max(100 * float(np.abs(fit.residuals).max()), 0.01)
    axis.set(
        xscale="log", xlabel="tokens", ylabel="measured over fitted loss (%)", ylim=(-1.15 * largest, 1.15 * largest),
        title=f"Residuals: {fit.residual_std:.2%} rms",
    )  # fmt: skip
    axis.figure.colorbar(mappable, ax=axis, label="parameters")


def _parabolas(axis: Any, fit: Fit, runs: Runs) -> None:
    budgets = fit.details["budgets"]
    colours, _ = _colours(np.array([budget["flops"] for budget in budgets]))
    for budget, colour in zip(budgets, colours, strict=True):
        here = np.abs(np.log(runs.flops / budget["flops"])) < 0.1
        sizes = runs.params[here]
        axis.scatter(sizes, runs.loss[here], color=colour, s=18, zorder=3)
        line = np.geomspace(sizes.min(), sizes.max(), 100)
        fitted = np.polyval(budget["coefficients"], np.log(line) - budget["centre"])
        axis.plot(line, fitted, color=colour, linewidth=1, label=f"{budget['flops']:.2g} FLOPs")
        axis.scatter(budget["params"], budget["loss"], marker="*", s=120, color="tab:red", zorder=4)
    axis.set(
        xscale="log", xlabel="parameters", ylabel="loss (nats a token)",
        title="isoFLOP parabolas, minima in red",
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def _best_sizes(axis: Any, fit: Fit) -> None:
    points = fit.details["budgets"] if fit.approach == "2" else None
    if points:
        flops = np.array([point["flops"] for point in points])
        best = np.array([point["params"] for point in points])
        ends = np.array([point["params_interval"] for point in points]).T
        errors = np.maximum(np.abs(ends - best), 0)
        axis.errorbar(flops, best, yerr=errors, fmt="*", markersize=10, color="tab:red", capsize=2)
    else:
        flops = np.array(fit.details["envelope"]["flops"])
        axis.scatter(flops, fit.details["envelope"]["params"], s=6, color="tab:red")
    line = np.geomspace(flops.min() / 2, flops.max() * 10, 50)
    sizes = [fit.law.optimum(c).params for c in line]  # pyright: ignore
    low, high = np.array(
        [fit.interval_of(lambda each, c=c: each.optimum(c).params) for c in line]
    ).T
    axis.fill_between(line, low, high, color="tab:blue", alpha=0.15, linewidth=0)
    axis.plot(line, sizes, color="tab:blue")
    low_a, high_a = fit.interval["a"]
    axis.set(
        xscale="log", yscale="log", xlabel="compute 6ND (FLOPs)", ylabel="best size (parameters)",
        title=f"Best size ~ C^{fit.values['a']:.3f} ({low_a:.3f} to {high_a:.3f})",
    )  # fmt: skip


def _envelope(axis: Any, fit: Fit, curves: Sequence[Curve]) -> None:
    runs = final_runs(curves)
    colours, mappable = _colours(runs.params)
    for curve, colour in zip(curves, colours, strict=True):
        flops = FLOPS_PER_PARAM_TOKEN * curve.params * curve.tokens
        axis.plot(flops, curve.loss, color=colour, linewidth=0.8)
    envelope = fit.details["envelope"]
    label = "best of all, between other sizes"
    axis.plot(envelope["flops"], envelope["loss"], ".", markersize=3, color="tab:red", label=label)
    spread = runs.loss.max() - runs.loss.min()
    axis.set(
        xscale="log", xlabel="compute 6ND (FLOPs)", ylabel="loss (nats a token)",
        xlim=(envelope["flops"][0] / 5, 2 * runs.flops.max()),
        ylim=(runs.loss.min() - 0.1 * spread, max(envelope["loss"]) + 0.5 * spread),
        title="Training curves and their envelope",
    )  # fmt: skip
    axis.legend(frameon=False)
    axis.figure.colorbar(mappable, ax=axis, label="parameters")


def plot_check(verdict: Verdict, curve: Curve, end_tokens: float, path: str) -> None:
    """A run's loss inside the band that the law expects."""
    figure, (axis,) = _figure(1)
    fractions, expected, low, high = verdict.band
    axis.fill_between(fractions, low, high, color="tab:blue", alpha=0.15, linewidth=0)
    axis.plot(fractions, expected, color="tab:blue", label="expected by the law")
    axis.plot(
        curve.tokens / end_tokens, curve.loss, color="tab:red", linewidth=1.2, label="this run"
    )
    spread = float(expected[0] - expected[-1])
    axis.set(
        xlabel="share of the run that is done", ylabel="loss (nats a token)", xlim=(0, 1.02),
        ylim=(min(low[-1], verdict.loss) - 0.15 * spread, max(float(expected[0]), verdict.loss) + 0.5 * spread),
        title=f"{curve.name}: {verdict.verdict}",
    )  # fmt: skip
    axis.legend(frameon=False)
    save(figure, path)


def plot_noise(found: Any, path: str) -> None:
    """Batch size and gradient noise scale by step (tools/noise_scale.py), and a band of half to twice the latter."""
    figure, (axis,) = _figure(1)
    steps, scales = found["steps"], np.array(found["noise_scale_samples"])
    axis.fill_between(steps, scales / 2, scales * 2, alpha=0.15, label="half to twice of it")
    axis.plot(steps, scales, label="gradient noise scale")
    axis.step(steps, found["batch_size_samples"], where="post", color="black", label="batch size")
    axis.set(yscale="log", xlabel="step", ylabel="samples", title=Path(found["model_dir"]).name)
    axis.legend(frameon=False)
    save(figure, path)
