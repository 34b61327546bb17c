"""Is a run on its curve: the shape the training curves of a sweep share, and what it predicts for a larger run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage, stats

from bloomjax.errors import BadInput
from bloomjax.scaling_fits import Fit
from bloomjax.scaling_laws import KaplanLaw, ParametricLaw
from bloomjax.scaling_runs import Curve

SMOOTHING_STEPS = 10.0  # width of the Gaussian; arXiv 2203.15556, approach 1
FRACTIONS = tuple(round(0.05 * number, 2) for number in range(1, 21))
# One-sided chance of an alarm in a run that follows the law.
ALARM_CHANCE = 1e-3
# The loss cannot tell where a model a quarter as large would pass: the 13B that was like a 2.7B to 6B is such a case.
HIDDEN_SIZE = 0.25
# Nor beyond this many times the compute of the largest run behind the law.
MAX_EXTRAPOLATION = 100.0


def smooth(loss: np.ndarray) -> np.ndarray:
    """Loss of each step [steps] under a Gaussian of SMOOTHING_STEPS, less in runs shorter than 500 steps."""
    width = min(SMOOTHING_STEPS, len(loss) / 50)
    # Reflected at the ends: repeating the last value would give it half of all weight.
    return ndimage.gaussian_filter1d(np.asarray(loss, np.float64), max(width, 1e-3), mode="reflect")


def thin(curve: Curve, num_points: int = 200) -> Curve:
    """At most `num_points` of the points, evenly spread, the last among them."""
    if len(curve.tokens) <= num_points:
        return curve
    places = np.unique(np.linspace(0, len(curve.tokens) - 1, num_points).round().astype(int))
    return dataclasses.replace(curve, tokens=curve.tokens[places], loss=curve.loss[places])


# ---- the shape of a sweep's curves ----


@dataclasses.dataclass(frozen=True)
class Profile:
    """log [(L(f) - E) / (L_end - E)] at fractions f of a run, where L_end is what the law gives for its end.

    Of runs scaled alike, curves of reducible loss fall on one another (Qiu et al. 2025, arXiv 2507.02119); what is left
    is taken as a line in log C where there are enough runs.

    fractions, mean, slope, spread: float64 [fractions]; slope per log of compute, from `centre` on. squares: sum of
    squared distances of log C from there. num_runs: curves behind it.
    """

    fractions: np.ndarray
    mean: np.ndarray
    slope: np.ndarray
    spread: np.ndarray
    centre: float
    squares: float
    num_runs: int

    @property
    def freedom(self) -> int:
        return max(1, self.num_runs - (2 if self.squares else 1))

    def at(self, fractions: np.ndarray, log_flops: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation for a run of exp(log_flops); nan outside the fractions there are."""
        away = log_flops - self.centre

        def between(values: np.ndarray) -> np.ndarray:
            return np.interp(fractions, self.fractions, values, left=np.nan, right=np.nan)

        leverage = 1 + 1 / self.num_runs + (away**2 / self.squares if self.squares else 0.0)
        return between(self.mean + self.slope * away), between(self.spread) * math.sqrt(leverage)

    def record(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Profile":
        """What `record` wrote. BadInput if it is damaged."""
        names = ("fractions", "mean", "slope", "spread")
        try:
            arrays = np.stack([np.array(record[name], np.float64) for name in names])
            numbers = [float(record[name]) for name in ("centre", "squares")]
            if arrays.ndim != 2 or not arrays.size:
                raise ValueError(f"{names} of shape {arrays.shape}")
            return cls(*arrays, *numbers, num_runs=int(record["num_runs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"the profile of the law is damaged: {error!r}") from None


def floor_of(law: ParametricLaw | KaplanLaw) -> float:
    """The loss that no run gets under; Kaplan's law has none."""
    return law.E if isinstance(law, ParametricLaw) else 0.0


def fit_profile(curves: Sequence[Curve], law: ParametricLaw | KaplanLaw) -> Profile:
    """The common shape of `curves`, those with a wrong cosine left out. BadInput for fewer than 4 runs."""
    chosen = [curve for curve in curves if curve.is_matched is not False]
    if len(chosen) < 4:
        raise BadInput(
            f"a common shape needs at least 4 runs with a matched cosine, got {len(chosen)}"
        )
    rows = np.array([_shape(curve, law) for curve in chosen])
    # The end is there for every run; an earlier fraction counts where all runs have it.
    there = np.isfinite(rows).all(0)
    rows, fractions = rows[:, there], np.array(FRACTIONS)[there]
    log_flops = np.log([6.0 * curve.params * curve.tokens[-1] for curve in chosen])
    centre = float(log_flops.mean())
    away = log_flops - centre
    squares = float(np.sum(away**2))
    if len(chosen) < 8 or np.ptp(log_flops) < math.log(4):
        squares = 0.0
    slope = away @ rows / squares if squares else np.zeros(rows.shape[1])
    rest = rows - rows.mean(0) - away[:, None] * slope
    # The law has been fitted to the ends of the same runs, which takes its constants off their freedom.
    constants = 5 if isinstance(law, ParametricLaw) else 4
    freedom = max(1, len(chosen) - constants)
    spread = np.sqrt(np.sum(rest**2, 0) / freedom)
    return Profile(fractions, rows.mean(0), slope, spread, centre, squares, len(chosen))


def _shape(curve: Curve, law: ParametricLaw | KaplanLaw) -> np.ndarray:
    """log [(L(f) - E) / (L_end - E)] at FRACTIONS; nan before the first point, and where L is not above E."""
    end = float(law.loss(curve.params, curve.tokens[-1]))
    fractions = curve.tokens / curve.tokens[-1]
    loss = np.interp(FRACTIONS, fractions, curve.loss, left=np.nan)
    floor = floor_of(law)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.log((loss - floor) / (end - floor))
    if len(curve.tokens) < 10:  # too few points to say anything about the way there
        found[:-1] = np.nan
    return found


# ---- one run against it ----


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the loss of a run says.

    verdict: "on its curve", "slow", "better than predicted" or "cannot tell".
    reasons: why it cannot tell. remarks: what else is odd, such as its schedule. One line each.
    fraction: of the run that is done. loss: now, smoothed. end_predicted, end_interval: of the loss at the end.
    expected, interval: of the loss now. end_projected: as the run goes. effective_params: the size that would end there
    if all went well, inf if none would. hidden_params: the smallest size that would still pass for this run. These five
    are None if the loss cannot be compared at all.
    band: fractions, expected loss, low, high along the whole run, for plots; float64 [4, points].
    """

    verdict: str
    reasons: list[str]
    remarks: list[str]
    fraction: float
    loss: float
    end_predicted: float
    end_interval: tuple[float, float]
    band: np.ndarray
    expected: float | None = None
    interval: tuple[float, float] | None = None
    end_projected: float | None = None
    effective_params: float | None = None
    hidden_params: float | None = None


class Expectation:
    """What a fit with its profile expects of a run of `params` parameters and `end_tokens` tokens.

    BadInput for a law that gives no loss, or has no profile.
    """

    def __init__(self, fit: Fit, params: float, end_tokens: float):
        law = fit.law
        if not isinstance(law, ParametricLaw | KaplanLaw):
            raise BadInput(
                "a run can be compared with a law of the loss, approach 3 or kaplan; "
                f"this is approach {fit.approach}"
            )
        if "profile" not in fit.details:
            raise BadInput(
                "this law was fitted to fewer than 4 runs with a matched cosine: no curve to compare with"
            )
        self.law = law
        self.profile = Profile.from_record(fit.details["profile"])
        self.floor = floor_of(law)
        self.end = float(law.loss(params, end_tokens))
        self.limit = float(stats.t.ppf(1 - ALARM_CHANCE, self.profile.freedom))
        self._log_flops = math.log(6.0 * params * end_tokens)
        size, length = np.float64(params), np.float64(end_tokens)
        with np.errstate(all="ignore"):  # a degenerate replicate may say anything
            ends = np.array([each.loss(size, length) for each in fit.sample_laws()])  # pyright: ignore
            spread = np.log((ends - self.floor) / (self.end - self.floor))
        spread = spread[np.isfinite(spread)]
        self._uncertainty = float(np.std(spread)) if len(spread) else 0.0

    def at(self, fractions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of log [(L - E) / (L_end - E)]."""
        mean, spread = self.profile.at(fractions, self._log_flops)
        return mean, np.hypot(spread, self._uncertainty)

    def loss(self, log_excess: Any) -> Any:
        return self.floor + (self.end - self.floor) * np.exp(log_excess)

    def band(self, fractions: np.ndarray) -> np.ndarray:
        """Expected loss, low and high, [3, points]."""
        mean, spread = self.at(fractions)
        return self.loss(np.stack([mean, mean - self.limit * spread, mean + self.limit * spread]))


def check(
    curve: Curve, end_tokens: float, fit: Fit, expectation: Expectation | None = None
) -> Verdict:
    """Compares the loss of a run so far with what `fit`, of runs on the same text, expects of it.

    curve: smoothed as the curves behind the fit were. end_tokens: what it will have seen at its end. expectation: that
    of `fit` for this run, if it is at hand.
    It is flagged when the mean excess over the last tenth of what is done leaves the band: bootstrap of the law, spread
    of the sweep's runs around it, Student's t at ALARM_CHANCE. BadInput for a law that gives no loss or has no profile.
    """
    expectation = expectation or Expectation(fit, curve.params, end_tokens)
    fraction = min(1.0, float(curve.tokens[-1] / end_tokens))
    at_end = expectation.band(np.ones(1))[:, 0].tolist()
    fractions = expectation.profile.fractions
    known: dict[str, Any] = dict(
        remarks=_about_schedule(curve, end_tokens),
        fraction=fraction,
        loss=float(curve.loss[-1]),
        end_predicted=at_end[0],
        end_interval=(at_end[1], at_end[2]),
        band=np.concatenate([fractions[None], expectation.band(fractions)]),
    )
    flops = 6.0 * curve.params * end_tokens
    reasons = []
    if flops > MAX_EXTRAPOLATION * fit.limits["flops"][1]:
        reasons.append(
            f"its {flops:.3g} FLOPs are {flops / fit.limits['flops'][1]:.3g} times those of the largest run "
            "behind the law"
        )
    done = np.minimum(curve.tokens / end_tokens, 1.0)
    last = done >= 0.9 * done[-1]
    mean, spread = expectation.at(done[last])
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = curve.loss[last] - expectation.floor
        excess = np.log(excess / (expectation.end - expectation.floor)) - mean
    if not np.isfinite(excess).any():
        reasons.append(_why_not(curve, fraction, expectation))
        return Verdict(verdict="cannot tell", reasons=reasons, **known)
    shift, total = float(np.nanmean(excess)), float(np.nanmean(spread))
    law = expectation.law
    projected = float(expectation.loss(shift))
    hidden = law.params_for(float(expectation.loss(expectation.limit * total)), end_tokens)
    if hidden < HIDDEN_SIZE * curve.params:
        reasons.append(
            f"the band is so wide that {hidden:.3g} parameters would pass for {curve.params:.3g}"
        )
    verdict = "on its curve"
    if abs(shift) > expectation.limit * total:
        verdict = "slow" if shift > 0 else "better than predicted"
    now = expectation.band(done[-1:])[:, 0].tolist()
    return Verdict(
        # A band too wide to be of use is no reason to doubt an alarm.
        verdict="cannot tell" if reasons and verdict == "on its curve" else verdict,
        reasons=reasons,
        expected=now[0],
        interval=(now[1], now[2]),
        end_projected=projected,
        effective_params=law.params_for(projected, end_tokens),
        hidden_params=hidden,
        **known,
    )


def loss_kind_of(fit: Fit, otherwise: str = "train") -> str:
    """Which loss the law is of: "train" or "validation"."""
    return fit.details.get("text", {}).get("loss_kind", otherwise)


def check_text(verdict: Verdict, fit: Fit, here: Mapping[str, str]) -> Verdict:
    """The same, or that it cannot tell, where the runs behind the law had another vocabulary or sequence length.

    here: those of the run, as `scaling_runs.text_of_run` gives them.
    """
    text = fit.details.get("text", {})
    reasons = [
        f"{name} is {value} here, {text[name]} in the runs behind the law: their losses cannot be compared"
        for name, value in here.items()
        if name in text and text[name] != value
    ]
    if not reasons:
        return verdict
    return dataclasses.replace(verdict, verdict="cannot tell", reasons=[*reasons, *verdict.reasons])


def _about_schedule(curve: Curve, end_tokens: float) -> list[str]:
    if curve.schedule_tokens is None:
        return ["where its cosine ends is not known"]
    ratio = curve.schedule_tokens / end_tokens
    if 0.8 <= ratio <= 1.25:
        return []
    return [
        f"its cosine ends after {ratio:.2g} times the run; the law is of runs where both end together"
    ]


def _why_not(curve: Curve, fraction: float, expectation: Expectation) -> str:
    first = float(expectation.profile.fractions[0])
    if curve.loss[-1] <= expectation.floor:
        return f"its loss {curve.loss[-1]:.4g} is below the E = {expectation.floor:.4g} of the law"
    if first == 1.0:
        return f"{fraction:.1%} of the run is done; the law knows no curves, so only the end can be compared"
    return f"{fraction:.1%} of the run is done; the law says nothing before {first:.0%}"
