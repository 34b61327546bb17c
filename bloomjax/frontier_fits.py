"""Approaches 1 and 2 of Chinchilla: the best size for a budget, read off runs without a law of the loss."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.scaling_fits import LEVEL, NUM_BOOTSTRAP, Fit, ends, make_fit, require
from bloomjax.scaling_laws import FLOPS_PER_PARAM_TOKEN, FrontierLaw
from bloomjax.scaling_runs import Curve, Runs, final_runs

_FRONTIER = ("params_coefficient", "a", "tokens_coefficient", "b")


# ---- approach 2: isoFLOP parabolas ----

_MIN_SIZES = 4  # of a budget; three would leave no residual


def fit_isoflop(
    runs: Runs,
    *,
    tolerance: float = 0.1,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> Fit:
    """Approach 2: a parabola of the loss in log N for each budget, a power law through their minima.

    Runs whose 6ND lies within `tolerance` of each other are one budget. The bootstrap draws the residuals of the
    parabolas anew. Raises BadInput unless two budgets have four sizes and a minimum between them.
    """
    require(runs, 2 * _MIN_SIZES, "approach 2", needs_both=False)
    found = [_Parabola(runs, places) for places in _budgets(runs.flops, tolerance)]
    groups = [group for group in found if not group.problem()]
    warnings = _left_out(found)
    if len(groups) < 2:
        raise BadInput(
            f"approach 2 needs two budgets or more with at least {_MIN_SIZES} sizes and a minimum between them; "
            f"found {len(groups)}" + (f" ({warnings[0]})" if warnings else "")
        )
    log_flops = np.log([group.flops for group in groups])
    log_best = np.log([group.best_params for group in groups])
    rng = np.random.default_rng(seed)
    scaled = np.concatenate([group.scaled_residuals for group in groups])
    minima = np.stack([group.resample(scaled, rng, num_bootstrap) for group in groups], 1)
    good = np.isfinite(minima).all(1)
    if not good.any():
        raise BadInput(
            f"approach 2: none of the {num_bootstrap} bootstrap replicates has a minimum at every budget; "
            "sizes are too close together, or the loss is too noisy"
        )
    if good.mean() < 0.9:
        warnings.append(
            f"{1 - good.mean():.0%} of the bootstrap replicates have a parabola without a minimum: "
            "sizes too close together, or loss too noisy"
        )
    values, residuals = _power_law(log_flops, log_best)
    samples = np.array([_power_law(log_flops, row)[0] for row in minima[good]])
    if len(groups) < 4:
        warnings.append(f"{len(groups)} budgets: an exponent needs four or more to be trusted")
    if np.ptp(log_flops) < math.log(8):
        warnings.append(
            f"budgets span a factor {math.exp(np.ptp(log_flops)):.2g} only; below 8 the exponent is mostly noise"
        )
    names = tuple(f"budget {group.flops:.4g}" for group in groups)
    fit = make_fit("2", _FRONTIER, values, samples, runs, residuals, names)
    details = {
        "params_exponent": values[1],
        "budgets": [
            group.record(low, high)
            for group, low, high in zip(
                groups, *np.exp(ends(minima[good], LEVEL)).tolist(), strict=True
            )
        ],
    }
    return dataclasses.replace(fit, details=details, warnings=(*fit.warnings, *warnings))


def _left_out(groups: "list[_Parabola]") -> list[str]:
    """One line for budgets with too few sizes, one for each other budget that gives no minimum."""
    few = [group for group in groups if group.num_sizes < _MIN_SIZES]
    lines = []
    if few:
        lines.append(
            f"{len(few)} of {len(groups)} budgets have fewer than {_MIN_SIZES} sizes and are left out "
            f"(such as {few[0].flops:.3g} with {few[0].num_sizes})"
        )
    for group in groups:
        problem = group.problem()
        if problem and group not in few:
            lines.append(f"budget {group.flops:.3g}: {problem}; left out")
    return lines


def _power_law(log_flops: np.ndarray, log_params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Constants in the order of _FRONTIER of N_opt = k C^a, and residuals of log N."""
    slope, intercept = np.polyfit(log_flops, log_params, 1)
    law = FrontierLaw.of_params(math.exp(intercept), slope)
    residuals = log_params - intercept - slope * log_flops
    return np.array(dataclasses.astuple(law)), residuals


def _budgets(flops: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """Places of runs whose compute is the same within `tolerance`, cheapest first."""
    order = np.argsort(flops)
    groups: list[list[int]] = []
    for place in order:
        if groups and flops[place] <= flops[groups[-1][0]] * (1 + tolerance):
            groups[-1].append(int(place))
        else:
            groups.append([int(place)])
    return [np.array(group) for group in groups]


class _Parabola:
    """Loss of one budget as a parabola in log N."""

    def __init__(self, runs: Runs, places: np.ndarray):
        self.flops = float(np.exp(np.mean(np.log(runs.flops[places]))))
        self.log_params = np.log(runs.params[places])
        self.loss = runs.loss[places]
        self.num_sizes = len(np.unique(np.round(self.log_params, 6)))
        self._centre = float(self.log_params.mean())
        self.coefficients = np.zeros(3)
        if self.num_sizes >= 3:
            powers = np.vander(self.log_params - self._centre, 3)
            self._solve = np.linalg.pinv(powers)
            self._fitted = powers @ (self._solve @ self.loss)
            self.coefficients = self._solve @ self.loss

    @property
    def best_params(self) -> float:
        return math.exp(self._minimum(self.coefficients[None])[0])

    @property
    def scaled_residuals(self) -> np.ndarray:
        """Relative to the loss, and widened for the three constants that were fitted."""
        freedom = len(self.loss) / (len(self.loss) - 3)
        return (self.loss - self._fitted) / self._fitted * math.sqrt(freedom)

    def problem(self) -> str | None:
        """Why there is no minimum to be had, if so."""
        if self.num_sizes < _MIN_SIZES:
            return f"{self.num_sizes} sizes, {_MIN_SIZES} are needed"
        if self.coefficients[0] <= 0:
            return "the loss has no minimum in size"
        low, high = math.exp(self.log_params.min()), math.exp(self.log_params.max())
        if not low < self.best_params < high:
            return (
                f"the minimum {self.best_params:.3g} lies outside its sizes {low:.3g} to {high:.3g}"
            )
        return None

    def _minimum(self, coefficients: np.ndarray) -> np.ndarray:
        """log N at the minimum, [n] for [n, 3]; nan where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            at = self._centre - coefficients[:, 1] / (2 * coefficients[:, 0])
        return np.where(coefficients[:, 0] > 0, at, np.nan)

    def resample(self, residuals: np.ndarray, rng: np.random.Generator, num: int) -> np.ndarray:
        """log N of the minimum for `num` draws of the residuals."""
        drawn = rng.choice(residuals, (num, len(self.loss)))
        return self._minimum(self._fitted * (1 + drawn) @ self._solve.T)

    def record(self, low: float, high: float) -> dict[str, Any]:
        lowest = float(np.polyval(self.coefficients, math.log(self.best_params) - self._centre))
        return {
            "flops": self.flops,
            "params": self.best_params,
            "params_interval": [low, high],
            "tokens": self.flops / (FLOPS_PER_PARAM_TOKEN * self.best_params),
            "loss": lowest,
            "num_runs": len(self.loss),
            "coefficients": self.coefficients.tolist(),
            "centre": self._centre,
        }


# ---- approach 1: envelope of training curves ----


def fit_envelope(
    curves: Sequence[Curve],
    *,
    num_budgets: int = 1500,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> Fit:
    """Approach 1: which size has the lowest loss at each of 1,500 budgets, and a power law through them.

    A budget counts only if curves of a smaller and of a larger size reach it: at the edge of the sizes the best one is
    not among them. The curves should be smooth (`collect` smooths); the bootstrap draws whole curves, which makes the
    interval some 2.5 times as wide as what repeated simulated sweeps show. Raises BadInput for fewer than three sizes,
    and where curves have one point.
    """
    runs = final_runs(curves)
    require(runs, 3, "approach 1", needs_both=False)
    if max(len(curve.tokens) for curve in curves) < 3:
        raise BadInput(
            "approach 1 needs training curves: a column run, with several rows for each run"
        )
    log_params = _merged(np.log(runs.params))
    lengths = np.unique(log_params, return_counts=True)[1]
    num_sizes = len(lengths)
    if num_sizes < 3:
        raise BadInput(f"approach 1 needs at least 3 sizes, these curves have {num_sizes}")
    log_flops = [np.log(FLOPS_PER_PARAM_TOKEN * curve.params * curve.tokens) for curve in curves]
    grid = np.linspace(min(x[0] for x in log_flops), max(x[-1] for x in log_flops), num_budgets)
    losses = np.array(
        [
            np.interp(grid, x, curve.loss, left=np.inf, right=np.inf)
            for x, curve in zip(log_flops, curves, strict=True)
        ]
    )
    places, sizes = _envelope(losses, log_params)
    if len(np.unique(sizes)) < 2:
        raise BadInput(
            "approach 1: at no budget is the best size between others for two sizes or more; "
            "train more sizes, or longer"
        )
    values, residuals = _power_law(grid[places], sizes)
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_bootstrap):
        drawn = _draw_curves(log_params, rng)
        at, best = _envelope(losses[drawn], log_params[drawn])
        if len(np.unique(best)) >= 2:
            samples.append(_power_law(grid[at], best)[0])
    warnings = []
    num_best = len(np.unique(sizes))
    if np.median(lengths) < 3:
        warnings.append(
            "most sizes have fewer than 3 lengths of run: the best size between their ends is one of runs in mid-cosine"
        )
    if num_best < 4:
        warnings.append(f"only {num_best} sizes are the best anywhere: the exponent rests on them")
    if len(samples) < 0.9 * num_bootstrap:
        warnings.append(
            f"{1 - len(samples) / num_bootstrap:.0%} of the bootstrap replicates have no envelope"
        )
    names = tuple(f"{flops:.6g}" for flops in np.exp(grid[places]))
    fit = make_fit("1", _FRONTIER, values, np.array(samples), runs, residuals, names)
    envelope = {
        "flops": np.exp(grid[places]).tolist(),
        "params": np.exp(sizes).tolist(),
        "loss": losses.min(0)[places].tolist(),
    }
    details = {"params_exponent": values[1], "num_best_sizes": num_best, "envelope": envelope}
    return dataclasses.replace(fit, details=details, warnings=(*fit.warnings, *warnings))


def _merged(log_params: np.ndarray) -> np.ndarray:
    """Each log of a size as the mean of those within 1 % of the next: from flops / 6D a size differs in its last
    digits from run to run."""
    order = np.argsort(log_params)
    groups = np.cumsum(np.diff(log_params[order], prepend=log_params[order[0]]) > 0.01)
    means = np.bincount(groups, log_params[order]) / np.bincount(groups)
    found = np.empty_like(log_params)
    found[order] = means[groups]
    return found


def _draw_curves(log_params: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the curves of one replicate: drawn within each size where all have three or more, else from all.

    Whole sizes missing would widen the interval far beyond what another sweep would show; even so it is wide.
    """
    sizes = [np.flatnonzero(log_params == size) for size in np.unique(log_params)]
    if min(map(len, sizes)) < 3:
        return np.unique(rng.integers(0, len(log_params), len(log_params)))
    return np.unique(np.concatenate([rng.choice(places, len(places)) for places in sizes]))


def _envelope(losses: np.ndarray, log_params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Budgets (places in the grid) with a best size between others, and log of that size."""
    there = np.isfinite(losses)
    sizes = log_params[np.argmin(losses, 0)]
    smallest = np.where(there, log_params[:, None], np.inf).min(0)
    largest = np.where(there, log_params[:, None], -np.inf).max(0)
    places = np.flatnonzero(there.any(0) & (smallest < sizes) & (sizes < largest))
    return places, sizes[places]
