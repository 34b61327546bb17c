"""Fits of the loss of finished runs: Chinchilla's approach 3, Kaplan's law and repeated data.

Every fit comes with bootstrap intervals, residuals, and warnings where the runs cannot support it. Approaches 1 and 2,
which look for the best size alone, are in frontier_fits.py.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from bloomjax.errors import BadInput
from bloomjax.minimise import minimise_all
from bloomjax.scaling_laws import (
    PETAFLOP_DAY_FLOPS,
    DataConstrainedLaw,
    FrontierLaw,
    KaplanLaw,
    ParametricLaw,
    ShareLaw,
)
from bloomjax.scaling_runs import Runs

HUBER_DELTA = 1e-3  # of log loss; section 3.3 of arXiv 2203.15556
NUM_BOOTSTRAP = 400
LEVEL = 0.95

# Constants the residuals were fitted with, where there are more values: b follows from a, the coefficient of D from
# that of N; L(C) has residuals of its own.
_NUM_FREE = {"1": 2, "2": 2, "kaplan": 4}

AnyLaw = ParametricLaw | FrontierLaw | KaplanLaw | DataConstrainedLaw | ShareLaw


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law and how far to trust it.

    approach: "1", "2", "3", "kaplan", "repeated" or "share".
    values: constants by name; interval: (low, high) of each at `level`, from percentiles of the bootstrap.
    samples: float64 [replicates, constants], in the order of `values`.
    residuals: log of measured over fitted, [runs]: of the loss, or of the best size for approaches 1 and 2.
    residual_names: the run or budget of each.
    limits: smallest and largest params, tokens, flops of the runs.
    details: what is particular to the approach, for JSON.
    """

    approach: str
    values: dict[str, float]
    interval: dict[str, tuple[float, float]]
    samples: np.ndarray
    residuals: np.ndarray
    residual_names: tuple[str, ...]
    limits: dict[str, tuple[float, float]]
    num_runs: int
    warnings: tuple[str, ...]
    level: float = LEVEL
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def law(self) -> AnyLaw:
        return law_of(self.approach, self.values, self.details)

    @property
    def residual_std(self) -> float:
        """Root mean square of the residuals, with the constants counted off."""
        num_free = _NUM_FREE.get(self.approach, len(self.values))
        freedom = max(1, len(self.residuals) - num_free)
        return float(np.sqrt(np.sum(self.residuals**2) / freedom))

    def sample_laws(self) -> list[AnyLaw]:
        """The law of each bootstrap replicate."""
        names = list(self.values)
        return [
            law_of(self.approach, dict(zip(names, row, strict=True)), self.details)
            for row in self.samples.tolist()
        ]

    def interval_of(self, function: Callable[[Any], float]) -> tuple[float, float]:
        """Bootstrap interval of any number that follows from a law, such as the best size for a budget.

        Replicates whose law is too degenerate to have one are left out; (nan, nan) if no law has.
        """
        found = []
        for law in self.sample_laws():
            try:
                found.append(float(function(law)))
            except (ArithmeticError, ValueError):  # BadInput is a ValueError
                continue
        values = np.array(found)
        return _percentiles(values[np.isfinite(values)], self.level)

    def record(self) -> dict[str, Any]:
        """As JSON: the constants at the top, then everything that `from_record` needs."""
        return {
            "approach": self.approach,
            **self.values,
            "interval": {name: list(ends) for name, ends in self.interval.items()},
            "level": self.level,
            "num_runs": self.num_runs,
            "residual_std": self.residual_std,
            "warnings": list(self.warnings),
            "limits": {name: list(ends) for name, ends in self.limits.items()},
            "details": self.details,
            "names": list(self.values),
            "residuals": self.residuals.tolist(),
            "residual_names": list(self.residual_names),
            "bootstrap": self.samples.tolist(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Fit":
        """What `record` wrote. BadInput if something is missing."""
        try:
            names = record["names"]
            found = cls(
                approach=record["approach"],
                values={name: float(record[name]) for name in names},
                interval={name: tuple(ends) for name, ends in record["interval"].items()},
                samples=np.array(record["bootstrap"], np.float64).reshape(-1, len(names)),
                residuals=np.array(record["residuals"], np.float64),
                residual_names=tuple(record["residual_names"]),
                limits={name: tuple(ends) for name, ends in record["limits"].items()},
                num_runs=record["num_runs"],
                warnings=tuple(record["warnings"]),
                level=record["level"],
                details=record["details"],
            )
            assert isinstance(found.law, AnyLaw)  # its constants are there
            return found
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"not a law of `fit --json`: {error!r}") from None

    @classmethod
    def read(cls, path: str, option: str) -> "Fit":
        """The file that `fit --json` wrote. BadInput, which names the `option` that gave the path."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInput(
                f"{option}={path} cannot be read: {error}; it should come from fit --json"
            ) from None
        try:
            return cls.from_record(record)
        except BadInput as error:
            raise BadInput(f"{option}={path}: {error}") from None


def law_of(approach: str, values: Mapping[str, float], details: Mapping[str, Any]) -> AnyLaw:
    """The law with these constants."""
    if approach == "3":
        return ParametricLaw(**values)
    if approach == "kaplan":
        return KaplanLaw(*(values[name] for name in ("alpha_N", "N_c", "alpha_D", "D_c")))
    if approach == "share":
        constants = {name: value for name, value in values.items() if name != "gamma"}
        return ShareLaw(ParametricLaw(**constants), values["gamma"])
    if approach == "repeated":
        base = ParametricLaw(**details["base"])
        return DataConstrainedLaw(base, values["tokens_decay"], values["params_decay"])
    if approach not in ("1", "2"):
        raise BadInput(f"there is no approach {approach!r}")
    return FrontierLaw(
        values["params_coefficient"], values["a"], values["tokens_coefficient"], values["b"]
    )


# ---- approach 3: L(N, D) = E + A / N^alpha + B / D^beta ----

# The grid of 2203.15556: alpha, beta in 0, .5 ... 2; e in -1, -.5 ... 1; a, b in 0, 5 ... 25.
_EXPONENTS = np.arange(0, 2.01, 0.5)
_OFFSETS = np.arange(-1, 1.01, 0.5)
_STARTS = {4500: np.arange(0, 25.1, 5), 1125: np.arange(0, 20.1, 10)}


def start_grid(num_starts: int) -> np.ndarray:
    """Starts (a, b, e, alpha, beta), [num_starts, 5]: the published 4,500, or the 1,125 with a, b in 0, 10, 20."""
    if num_starts not in _STARTS:
        raise BadInput(f"starts must be 4500 or 1125, got {num_starts}")
    logs = _STARTS[num_starts]
    grid = np.meshgrid(logs, logs, _OFFSETS, _EXPONENTS, _EXPONENTS, indexing="ij")
    return np.stack(grid, -1).reshape(-1, 5)


class SumOfPowers:
    """Sum over runs of Huber(logsumexp(a - alpha log N, b - beta log D, e) - gamma log p - log L), and its gradient.

    a and b count from the mean of log N and log D, which takes most of their correlation with the exponents away.
    gamma is there only where shares p are given.
    """

    def __init__(self, runs: Runs, shares: np.ndarray | None = None):
        log_params, log_tokens = np.log(runs.params), np.log(runs.tokens)
        self.centre = float(log_params.mean()), float(log_tokens.mean())
        self._x, self._y = log_params - self.centre[0], log_tokens - self.centre[1]
        self._log_loss = np.log(runs.loss)
        self._log_shares = None if shares is None else np.log(shares)

    def shift(self, points: np.ndarray, sign: int) -> np.ndarray:
        """(a, b, ...) of the paper to ours (sign -1) or back (+1); [points, 5 or 6]."""
        points = np.array(points, np.float64)
        points[:, 0] += sign * points[:, 3] * self.centre[0]
        points[:, 1] += sign * points[:, 4] * self.centre[1]
        return points

    def log_loss(self, points: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Fitted log loss [points, runs] and the share of each of the three terms in the loss."""
        a, b, e, alpha, beta = points.T[:5, :, None]
        first, second = a - alpha * self._x, b - beta * self._y
        top = np.maximum(np.maximum(first, second), e)
        terms = np.exp(first - top), np.exp(second - top), np.exp(e - top)
        total = terms[0] + terms[1] + terms[2]
        found = top + np.log(total)
        if self._log_shares is not None:
            found = found - points[:, 5, None] * self._log_shares
        return found, tuple(term / total for term in terms)

    def residuals(self, point: np.ndarray) -> np.ndarray:
        """Log of measured over fitted loss, [runs]."""
        return self._log_loss - self.log_loss(point[None])[0][0]

    def __call__(self, points: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value [points] and gradient [points, 5 or 6] in units of HUBER_DELTA; weights [points or 1, runs]."""
        found, terms = self.log_loss(points)
        error = found - self._log_loss
        clipped = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
        value = np.sum(weights * clipped * (error - 0.5 * clipped), 1)
        slope = weights * clipped
        first, second = slope * terms[0], slope * terms[1]
        parts = [
            first.sum(1), second.sum(1), (slope * terms[2]).sum(1),
            -(first @ self._x), -(second @ self._y),
        ]  # fmt: skip
        if self._log_shares is not None:
            parts.append(-(slope @ self._log_shares))
        return value / HUBER_DELTA, np.stack(parts, 1) / HUBER_DELTA


def objective(law: ParametricLaw, runs: Runs) -> float:
    """The sum of Huber losses (delta 1e-3, log loss) that approach 3 minimises, at any constants."""
    error = np.log(law.loss(runs.params, runs.tokens)) - np.log(runs.loss)
    clipped = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
    return float(np.sum(clipped * (error - 0.5 * clipped)))


def fit_parametric(
    runs: Runs, *, num_starts: int = 4500, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> Fit:
    """Approach 3: all starts are minimised together, the best is refined; replicates start from the best.

    Raises BadInput for fewer than 6 runs, and where all have one size or one length.
    """
    require(runs, 6, "approach 3", needs_both=True)
    function = SumOfPowers(runs)
    whole = np.ones((1, len(runs)))
    points, values = minimise_all(
        function, function.shift(start_grid(num_starts), -1), lambda _: whole
    )
    best = refine(function, points[np.argmin(values)], whole)
    replicates = bootstrap_points(function, best, len(runs), num_bootstrap, seed)
    samples = constants_of(function.shift(replicates, 1))
    constants = constants_of(function.shift(best[None], 1))[0]
    names = ("E", "A", "B", "alpha", "beta")
    law = ParametricLaw(*constants)
    fit = make_fit("3", names, constants, samples, runs, function.residuals(best))
    details = {
        "objective": objective(law, runs),
        "num_starts": num_starts,
        "starts_at_best": float(np.mean(values < values.min() * (1 + 1e-3) + 1e-9)),
        "params_exponent": float(law.params_exponent),
        "params_exponent_interval": list(fit.interval_of(lambda each: each.params_exponent)),
    }
    warnings = [*fit.warnings, *degenerate(fit), *misfits(fit, runs)]
    return dataclasses.replace(fit, details=details, warnings=tuple(warnings))


def constants_of(points: np.ndarray) -> np.ndarray:
    """(a, b, e, alpha, beta, ...) to (E, A, B, alpha, beta, ...)."""
    powers = np.exp(np.clip(points[:, [2, 0, 1]], -700, 700))
    return np.concatenate([powers, points[:, 3:]], 1)


def refine(function: Callable[..., Any], point: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A last L-BFGS-B from the best point, with tight tolerances."""

    def one(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = function(x[None], weights)
        return float(value[0]), gradient[0]

    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-12}
    found = optimize.minimize(one, point, jac=True, method="L-BFGS-B", options=options)
    return found.x if found.fun <= one(point)[0] else point


def bootstrap_points(
    function: Any, best: np.ndarray, num_runs: int, num_bootstrap: int, seed: int
) -> np.ndarray:
    """Minima for resampled runs, [num_bootstrap, constants], each started from `best`."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), num_bootstrap).astype(
        float
    )
    starts = np.tile(best, (num_bootstrap, 1))
    return minimise_all(function, starts, lambda active: weights[active])[0]


# ---- Kaplan ----


class KaplanForm:
    """Like SumOfPowers for log L = alpha_D logsumexp(n - r log N, d - log D), r = alpha_N / alpha_D."""

    def __init__(self, runs: Runs):
        log_params, log_tokens = np.log(runs.params), np.log(runs.tokens)
        self.centre = float(log_params.mean()), float(log_tokens.mean())
        self._x, self._y = log_params - self.centre[0], log_tokens - self.centre[1]
        self._log_loss = np.log(runs.loss)

    def _parts(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, d, r, alpha = points.T[:, :, None]
        first, second = n - r * self._x, d - self._y
        with np.errstate(invalid="ignore"):  # both are infinite where a start has run away
            total = np.logaddexp(first, second)
        return alpha * total, total, np.exp(first - total)

    def residuals(self, point: np.ndarray) -> np.ndarray:
        return self._log_loss - self._parts(point[None])[0][0]

    def __call__(self, points: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, total, share = self._parts(points)
        alpha = points[:, 3, None]
        error = found - self._log_loss
        clipped = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
        value = np.sum(weights * clipped * (error - 0.5 * clipped), 1)
        slope = weights * clipped
        first = slope * alpha * share
        parts = [
            first.sum(1),
            (slope * alpha * (1 - share)).sum(1),
            -(first @ self._x),
            (slope * total).sum(1),
        ]
        return value / HUBER_DELTA, np.stack(parts, 1) / HUBER_DELTA

    def constants(self, points: np.ndarray) -> np.ndarray:
        """(alpha_N, N_c, alpha_D, D_c) of points (n, d, r, alpha), [points, 4]."""
        n, d, r, alpha = points.T
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            scale = np.exp(np.clip(n / r + self.centre[0], -700, 700))
        tokens = np.exp(np.clip(d + self.centre[1], -700, 700))
        return np.stack([r * alpha, scale, alpha, tokens], 1)


def fit_kaplan(runs: Runs, *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0) -> Fit:
    """Kaplan's L(N, D), and L(C) along the best runs: alpha_N N_c alpha_D D_c alpha_C C_c (C_c in PF-days).

    L(N) = (N_c/N)^alpha_N and L(D) are its limits. L(C) is a line in logs through the runs that no cheaper run beats.
    `params` should be those outside the embedding, as in the paper. Raises BadInput for fewer than 6 runs, and where
    all have one size or one length.
    """
    require(runs, 6, "approach kaplan", needs_both=True)
    function = KaplanForm(runs)
    grid = np.meshgrid(
        np.arange(0, 61, 10.0), np.arange(0, 61, 10.0), (0.3, 0.7, 1.5), (0.03, 0.1, 0.3)
    )
    whole = np.ones((1, len(runs)))
    points, values = minimise_all(
        function, np.stack(grid, -1).reshape(-1, 4), lambda _: whole, max_iterations=1000
    )
    best = refine(function, points[np.argmin(values)], whole)
    rng = np.random.default_rng(seed)
    picks = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), num_bootstrap)
    weights = picks.astype(float)
    replicates = minimise_all(
        function, np.tile(best, (num_bootstrap, 1)), lambda active: weights[active]
    )[0]
    compute = [_compute_law(runs, pick > 0) for pick in picks]
    samples = np.concatenate([function.constants(replicates), np.array(compute)], 1)
    constants = [
        *function.constants(best[None])[0],
        *_compute_law(runs, np.ones(len(runs), bool)),
    ]
    names = ("alpha_N", "N_c", "alpha_D", "D_c", "alpha_C", "C_c")
    samples = samples[np.isfinite(samples).all(1)]
    fit = make_fit("kaplan", names, np.array(constants), samples, runs, function.residuals(best))
    law = fit.law
    assert isinstance(law, KaplanLaw)
    warnings = [*fit.warnings, *misfits(fit, runs)]
    for name, at_most in (("alpha_N", 1.0), ("alpha_D", 1.0)):
        if not 0.005 < fit.values[name] < at_most:
            warnings.append(
                f"{name} = {fit.values[name]:.3g} is degenerate: these runs do not show how the loss "
                f"depends on {'params' if name == 'alpha_N' else 'tokens'}"
            )
    return dataclasses.replace(
        fit,
        warnings=tuple(warnings),
        details={"params_exponent": float(law.params_exponent)},
    )


def _compute_law(runs: Runs, there: np.ndarray) -> tuple[float, float]:
    """(alpha_C, C_c in PF-days) of the runs that no cheaper run beats; nan where fewer than two are left."""
    flops, loss = runs.flops[there], runs.loss[there]
    order = np.argsort(flops)
    flops, loss = flops[order], loss[order]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], loss[:-1]]))
    front = loss < best_before
    if front.sum() < 2 or np.ptp(np.log(flops[front])) < 1e-9:
        return math.nan, math.nan
    slope, intercept = np.polyfit(np.log(flops[front]), np.log(loss[front]), 1)
    return -float(slope), float(np.exp(-intercept / slope) / PETAFLOP_DAY_FLOPS)


# ---- repeated data ----


def fit_repetition(
    runs: Runs, base: ParametricLaw, *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> Fit:
    """R*_D and R*_N of the data-constrained law, on top of a law of unrepeated data (as arXiv 2305.16264 fits them).

    Raises BadInput unless three runs saw their text more than once.
    """
    require(runs, 3, "approach repeated", needs_both=False)
    epochs = runs.tokens / runs.unique_tokens
    if np.sum(epochs > 1.01) < 3:
        raise BadInput(
            "approach repeated needs three runs or more whose tokens exceed unique_tokens; "
            f"found {np.sum(epochs > 1.01)}"
        )
    log_loss = np.log(runs.loss)

    def errors(point: np.ndarray) -> np.ndarray:
        law = DataConstrainedLaw(base, *np.exp(np.clip(point, -7, 14)))
        return np.log(law.loss(runs.params, runs.tokens, runs.unique_tokens)) - log_loss

    def solve(weights: np.ndarray, start: np.ndarray) -> np.ndarray:
        def value(point: np.ndarray) -> float:
            error = errors(point)
            clipped = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
            return float(np.sum(weights * clipped * (error - 0.5 * clipped))) / HUBER_DELTA

        return optimize.minimize(value, start, method="Nelder-Mead", options={"xatol": 1e-4}).x

    ones = np.ones(len(runs))
    starts = [np.log([d, n]) for d in (1.0, 15.0, 200.0) for n in (1.0, 5.0, 50.0)]
    found = [solve(ones, start) for start in starts]
    best = min(found, key=lambda point: np.sum(np.abs(errors(point))))
    rng = np.random.default_rng(seed)
    picks = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), min(num_bootstrap, 100))
    samples = np.exp(np.clip([solve(pick.astype(float), best) for pick in picks], -7, 14))
    names = ("tokens_decay", "params_decay")
    fit = make_fit("repeated", names, np.exp(np.clip(best, -7, 14)), samples, runs, -errors(best))
    warnings = [*fit.warnings, *misfits(fit, runs)]
    if epochs.max() < 4:
        warnings.append(
            f"at most {epochs.max():.2g} epochs: up to 4, repeated text is as good as new; tokens_decay is unsure"
        )
    for name in names:
        low, high = fit.interval[name]
        if high > 20 * low:
            warnings.append(f"{name} lies anywhere between {low:.2g} and {high:.2g}")
    return dataclasses.replace(
        fit, details={"base": dataclasses.asdict(base)}, warnings=tuple(warnings)
    )


# ---- what all fits share ----


def require(runs: Runs, at_least: int, what: str, needs_both: bool) -> None:
    if len(runs) < at_least:
        raise BadInput(f"{what} needs at least {at_least} runs, got {len(runs)}")
    for name, values in (("params", runs.params), ("tokens", runs.tokens)):
        if (needs_both or name == "params") and np.ptp(np.log(values)) < 0.01:
            raise BadInput(
                f"all {len(runs)} runs have {name} = {values[0]:.4g}; {what} needs several {name}"
            )


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    low, high = ends(values, level)
    return float(low), float(high)


def ends(values: np.ndarray, level: float) -> np.ndarray:
    return np.percentile(values, [50 * (1 - level), 50 * (1 + level)], axis=0)


def make_fit(
    approach: str,
    names: Sequence[str],
    constants: np.ndarray,
    samples: np.ndarray,
    runs: Runs,
    residuals: np.ndarray,
    residual_names: tuple[str, ...] | None = None,
) -> Fit:
    limits = {
        name: (float(values.min()), float(values.max()))
        for name, values in (
            ("params", runs.params),
            ("tokens", runs.tokens),
            ("flops", runs.flops),
        )
    }
    samples = samples.reshape(-1, len(names))
    columns = zip(names, samples.T, strict=True)
    return Fit(
        approach=approach,
        values=dict(zip(names, map(float, constants), strict=True)),
        interval={name: _percentiles(column, LEVEL) for name, column in columns},
        samples=samples,
        residuals=np.asarray(residuals),
        residual_names=residual_names or runs.names,
        limits=limits,
        num_runs=len(runs),
        warnings=tuple(_range_warnings(runs, approach)),
    )


def _range_warnings(runs: Runs, approach: str) -> list[str]:
    """What any fit of a loss to these runs has to be told."""
    warnings = []
    if approach in ("3", "kaplan"):
        if len(runs) < 20:
            warnings.append(f"{len(runs)} runs for {5 if approach == '3' else 4} constants")
        for name, values in (("params", runs.params), ("tokens", runs.tokens)):
            factor = values.max() / values.min()
            if factor < 10:
                warnings.append(
                    f"{name} spans a factor {factor:.2g} only; below 10 its exponent and E cannot be told apart"
                )
        correlation = np.corrcoef(np.log(runs.params), np.log(runs.tokens))[0, 1]
        if abs(correlation) > 0.95:
            warnings.append(
                f"params and tokens move together (correlation {correlation:.2f}): the two terms cannot be told apart"
            )
    unmatched = [n for n, ok in zip(runs.names, runs.matched, strict=True) if ok is False]
    if unmatched:
        warnings.append(
            f"{len(unmatched)} of {len(runs)} runs have a cosine that does not end within 25 % of the run "
            f"(such as {unmatched[0]}): their loss is higher than that of a run of this length"
        )
    repeated = np.sum(runs.tokens > 4 * runs.unique_tokens)
    if repeated and approach != "repeated":
        warnings.append(
            f"{repeated} of {len(runs)} runs saw their text more than 4 times: tokens count for less than the law takes"
        )
    return warnings


def degenerate(fit: Fit) -> list[str]:
    """Approach 3 where a constant is not determined."""
    warnings = []
    for name, what in (("alpha", "params"), ("beta", "tokens")):
        value, (low, high) = fit.values[name], fit.interval[name]
        if not 0.05 < value < 1.2:
            warnings.append(
                f"{name} = {value:.3g} is degenerate: these runs do not show how the loss depends on {what}"
            )
        elif high - low > 0.75 * value:
            warnings.append(
                f"{name} is unsure by {high - low:.2g}, {(high - low) / value:.0%} of it"
            )
    lowest = min(fit.interval["E"][0], fit.values["E"])
    if fit.values["E"] < 0.02 or lowest < 0.02 * fit.interval["E"][1]:
        warnings.append(
            f"E may be anything from {fit.interval['E'][0]:.2g} to {fit.interval['E'][1]:.2g}: "
            "do not extrapolate the loss"
        )
    return warnings


def misfits(fit: Fit, runs: Runs) -> list[str]:
    """What the residuals show: a form that does not fit, a pattern, single runs far off."""
    warnings = []
    if fit.residual_std > 0.01:
        warnings.append(f"the law misses the runs by {fit.residual_std:.1%} (rms)")
    x, y = (np.log(v) - np.log(v).mean() for v in (runs.params, runs.tokens))
    pattern = np.stack([np.ones(len(x)), x, y, x * x, x * y, y * y], 1)
    freedom = len(x) - 6
    if freedom >= 6 and fit.residual_std > 1e-6:
        rest = fit.residuals - pattern @ np.linalg.lstsq(pattern, fit.residuals, rcond=None)[0]
        left, whole = np.sum(rest**2), np.sum((fit.residuals - fit.residuals.mean()) ** 2)
        chance = stats.f.sf((whole - left) / 5 / (left / freedom), 5, freedom)
        if chance < 1e-3:
            warnings.append(
                f"the residuals are no noise: a curve in N and D explains {1 - left / whole:.0%} of them"
            )
    return warnings + _outliers(fit)


def _outliers(fit: Fit) -> list[str]:
    """Runs far from the law; more than 6 robust deviations and 1 %."""
    spread = 1.4826 * float(np.median(np.abs(fit.residuals)))
    far = np.flatnonzero(np.abs(fit.residuals) > max(6 * spread, 0.01))
    if not len(far):
        return []
    worst = far[np.argmax(np.abs(fit.residuals[far]))]
    return [
        f"{len(far)} of {len(fit.residuals)} runs lie off the law, "
        f"{fit.residual_names[worst]} by {fit.residuals[worst]:+.1%} the most"
    ]
