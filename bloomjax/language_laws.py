"""Scaling laws by language: what a share of the mixture is worth, transfer, and the mixture they advise."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.minimise import minimise_all
from bloomjax.scaling_fits import (
    LEVEL,
    Fit,
    SumOfPowers,
    bootstrap_points,
    constants_of,
    degenerate,
    ends,
    fit_parametric,
    make_fit,
    misfits,
    refine,
    start_grid,
)
from bloomjax.scaling_laws import ParametricLaw, ShareLaw
from bloomjax.scaling_runs import Curve, Runs, final_runs

NUM_BOOTSTRAP = 200
# Text seen four times is nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264).
MAX_EPOCHS = 4.0
_MIN_SHARE_RATIO = 1.5


def fit_languages(
    curves: Sequence[Curve], *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> dict[str, Fit]:
    """The law of each language, by label: a ShareLaw, or approach 3 where its share never changes.

    BadInput if a curve has no language, or a language has too few runs.
    """
    unnamed = [curve.name for curve in curves if curve.language is None]
    if unnamed:
        raise BadInput(f"{unnamed[0]} has no language; the table needs the columns language, share")
    fits = {}
    for language in sorted({str(curve.language) for curve in curves}):
        own = [curve for curve in curves if curve.language == language]
        try:
            fits[language] = _fit_language(own, num_bootstrap, seed)
        except BadInput as error:
            raise BadInput(f"language {language}: {error}") from None
    return fits


def _fit_language(curves: Sequence[Curve], num_bootstrap: int, seed: int) -> Fit:
    runs = final_runs(curves)
    shares = np.array([curve.share or math.nan for curve in curves])
    if np.isnan(shares).any():
        raise BadInput(f"{curves[int(np.argmax(np.isnan(shares)))].name} has no share")
    if shares.max() / shares.min() < _MIN_SHARE_RATIO:
        fit = fit_parametric(runs, num_starts=1125, num_bootstrap=num_bootstrap, seed=seed)
        warning = (
            f"its share is {shares.min():.3g} to {shares.max():.3g} in all runs: what a larger share would bring "
            "cannot be told (train some runs with another mixture)"
        )
        return dataclasses.replace(fit, warnings=(*fit.warnings, warning))
    return fit_share(runs, shares, num_bootstrap=num_bootstrap, seed=seed)


def fit_share(
    runs: Runs, shares: np.ndarray, *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> Fit:
    """ShareLaw of one language: approach 3 with one more constant, gamma. BadInput for fewer than 7 runs."""
    if len(runs) < 7:
        raise BadInput(f"a law with shares needs at least 7 runs, got {len(runs)}")
    for name, values in (("params", runs.params), ("tokens", runs.tokens)):
        if np.ptp(np.log(values)) < 0.01:
            raise BadInput(
                f"all {len(runs)} runs have {name} = {values[0]:.4g}; several are needed"
            )
    function = SumOfPowers(runs, shares)
    whole = np.ones((1, len(runs)))
    starts = function.shift(start_grid(1125), -1)
    starts = np.concatenate([starts, np.full((len(starts), 1), 0.1)], 1)
    points, values = minimise_all(function, starts, lambda _: whole)
    best = refine(function, points[np.argmin(values)], whole)
    replicates = bootstrap_points(function, best, len(runs), num_bootstrap, seed)
    samples = constants_of(function.shift(replicates, 1))
    constants = constants_of(function.shift(best[None], 1))[0]
    names = ("E", "A", "B", "alpha", "beta", "gamma")
    fit = make_fit("share", names, constants, samples, runs, function.residuals(best))
    warnings = [*fit.warnings, *degenerate(fit), *misfits(fit, runs)]
    low, high = fit.interval["gamma"]
    if low <= 0:
        warnings.append(
            f"gamma lies between {low:.2g} and {high:.2g}: a larger share may bring nothing"
        )
    return dataclasses.replace(fit, warnings=tuple(warnings))


# ---- transfer ----


class TransferRates(NamedTuple):
    """Tokens of the target that one token of each other language is worth; negative ones disturb.

    interval: of each rate. effective_tokens: of each run that could be used, float64. warnings: one line each.
    """

    rates: dict[str, float]
    interval: dict[str, tuple[float, float]]
    effective_tokens: np.ndarray
    warnings: list[str]


def fit_transfer(
    alone: Fit,
    params: np.ndarray,
    own_tokens: np.ndarray,
    other_tokens: Mapping[str, np.ndarray],
    loss: np.ndarray,
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> TransferRates:
    """Rates t_j in D_eff = D_own + sum_j t_j D_j, where D_eff is what the target alone would have needed for its loss.

    `alone` is approach 3 on runs of the target by itself. Longpre et al. 2025 (arXiv 2510.22037) add up a target, its
    transfer languages and the rest in the same way; that rates are constant, repeated text counts in full, and the
    least squares are of relative errors is our simplification. Bootstrap over runs and over the law. BadInput for no
    more usable runs than languages.
    """
    names = list(other_tokens)
    others = np.stack([np.asarray(other_tokens[name], float) for name in names], 1)
    warnings = []

    def effective(law: ParametricLaw) -> np.ndarray:
        pairs = zip(loss.tolist(), params.tolist(), strict=True)
        return np.array([law.tokens_for(value, size) for value, size in pairs])

    def solve(tokens: np.ndarray, picks: np.ndarray) -> np.ndarray:
        picks = picks[np.isfinite(tokens[picks])]
        if len(picks) <= len(names):
            return np.full(len(names), np.nan)
        scale = tokens[picks]
        return np.linalg.lstsq(
            others[picks] / scale[:, None], (scale - own_tokens[picks]) / scale, rcond=None
        )[0]

    law = alone.law
    assert isinstance(law, ParametricLaw)
    everyone = np.arange(len(loss))
    tokens = effective(law)
    lost = int(np.sum(~np.isfinite(tokens)))
    if lost:
        warnings.append(
            f"{lost} of {len(loss)} runs are better than the language alone could be at any length; left out"
        )
    rates = solve(tokens, everyone)
    if np.isnan(rates).any():
        raise BadInput(
            f"transfer from {len(names)} languages needs more than {len(names)} usable runs, "
            f"got {len(loss) - lost}"
        )
    rng = np.random.default_rng(seed)
    laws = [each for each in alone.sample_laws() if isinstance(each, ParametricLaw)]
    samples = np.array(
        [
            solve(effective(laws[n % len(laws)]), rng.integers(0, len(loss), len(loss)))
            for n in range(num_bootstrap)
        ]
    )
    samples = samples[np.isfinite(samples).all(1)]
    if len(samples) < 0.9 * num_bootstrap:
        warnings.append(
            "too few usable runs in many bootstrap replicates: the intervals are unsure"
        )
    edges = ends(samples, LEVEL).T.tolist()
    beyond = (own_tokens.max() / alone.limits["tokens"][1], tokens[np.isfinite(tokens)].max())
    if beyond[1] > 3 * alone.limits["tokens"][1]:
        warnings.append(
            f"effective tokens reach {beyond[1]:.3g}, beyond the {alone.limits['tokens'][1]:.3g} that the language "
            "alone was trained on"
        )
    return TransferRates(
        dict(zip(names, rates.tolist(), strict=True)),
        {name: (low, high) for name, (low, high) in zip(names, edges, strict=True)},
        tokens[np.isfinite(tokens)],
        warnings,
    )


_NUM_ALONE = 6  # runs of one language by itself, which approach 3 needs


def transfers(curves: Sequence[Curve]) -> dict[str, TransferRates]:
    """fit_transfer from a table by language: the laws of the languages that have runs by themselves (share 1), and the
    rates from their other runs. BadInput, naming the language, where these are too few."""
    runs: dict[str, dict[str, Curve]] = {}
    for curve in curves:
        runs.setdefault(curve.name, {})[str(curve.language)] = curve
    found = {}
    for language in sorted({str(curve.language) for curve in curves}):
        own = [curve for curve in curves if curve.language == language and curve.share]
        alone = [curve for curve in own if (curve.share or 0.0) > 0.999]
        mixed = [curve for curve in own if (curve.share or 0.0) <= 0.999]
        if len(alone) < _NUM_ALONE or not mixed:
            continue
        tokens = {
            name: np.array(
                [
                    (runs[curve.name][name].share or 0.0) * curve.tokens[-1]
                    if name in runs[curve.name]
                    else 0.0
                    for curve in mixed
                ]
            )
            for name in sorted({name for curve in mixed for name in runs[curve.name]})
        }
        ends_ = final_runs(mixed)
        try:
            law = fit_parametric(final_runs(alone), num_starts=1125, num_bootstrap=NUM_BOOTSTRAP)
            found[language] = fit_transfer(
                law, ends_.params, tokens.pop(language), tokens, ends_.loss
            )
        except BadInput as error:
            raise BadInput(f"language {language}: {error}") from None
    return found


# ---- mixture ----


class Advice(NamedTuple):
    """For one language of a planned run: its best share and what that share is worth.

    interval: of the share. loss: at that share. transferred_tokens: what the other languages are worth to it.
    is_capped: the share is all that its text allows.
    """

    share: float
    interval: tuple[float, float]
    loss: float
    transferred_tokens: float
    is_capped: bool


def best_shares(
    laws: Mapping[str, ShareLaw],
    params: float,
    tokens: float,
    *,
    weights: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
    max_epochs: float = MAX_EPOCHS,
) -> dict[str, float]:
    """Shares that minimise sum_i w_i L_i(N, D, p_i), of sum 1.

    weights: what a nat of each language is worth. Default 1 / L_i(N, D, 1), so that losses relative to the language
      alone add up: losses in nats a token differ with how the vocabulary cuts a language.
    unique_tokens: text there is of each language; a share stops at `max_epochs` times it.

    The sum is convex in p, so p_i = (w_i gamma_i L_i(1) / lambda)^(1 / (1 + gamma_i)), or its cap; lambda by bisection.
    BadInput for a gamma that is not above 0, and when all text together is too little.
    """
    names = list(laws)
    flat = [name for name in names if laws[name].gamma <= 0]
    if flat:
        raise BadInput(
            f"gamma of {', '.join(flat)} is not above 0: no share is the best; leave them at a fixed share"
        )
    alone = np.array([float(laws[name].base.loss(params, tokens)) for name in names])
    gamma = np.array([laws[name].gamma for name in names])
    worth = (
        np.ones(len(names))
        if weights is None
        else np.array([weights[name] for name in names]) * alone
    )
    caps = np.ones(len(names))
    if unique_tokens is not None:
        caps = np.array(
            [min(1.0, max_epochs * unique_tokens.get(n, math.inf) / tokens) for n in names]
        )
    if caps.sum() < 1:
        raise BadInput(
            f"all text together is {caps.sum():.0%} of {tokens:.3g} tokens at {max_epochs:g} epochs; "
            "train on fewer tokens, or allow more epochs"
        )

    def shares(log_price: float) -> np.ndarray:
        return np.minimum(caps, np.exp((np.log(worth * gamma) - log_price) / (1 + gamma)))

    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        if shares(middle).sum() > 1:
            low = middle
        else:
            high = middle
    found = shares((low + high) / 2)
    return dict(zip(names, (found / found.sum()).tolist(), strict=True))


def advise(
    fits: Mapping[str, Fit],
    params: float,
    tokens: float,
    *,
    weights: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
    max_epochs: float = MAX_EPOCHS,
) -> dict[str, Advice]:
    """best_shares with bootstrap intervals, for the languages whose fits tell what a share is worth.

    BadInput if none does.
    """
    laws = {name: fit.law for name, fit in fits.items()}
    laws = {name: law for name, law in laws.items() if isinstance(law, ShareLaw) and law.gamma > 0}
    if not laws:
        raise BadInput(
            "no language has runs at different shares; a mixture cannot be advised from them"
        )

    def solve(chosen: Mapping[str, ShareLaw]) -> dict[str, float]:
        return best_shares(
            chosen,
            params,
            tokens,
            weights=weights,
            unique_tokens=unique_tokens,
            max_epochs=max_epochs,
        )

    best = solve(laws)
    sampled = {name: fits[name].sample_laws() for name in laws}
    num = min(len(samples) for samples in sampled.values())
    drawn = []
    for number in range(num):
        chosen = {name: samples[number] for name, samples in sampled.items()}
        usable = {name: law for name, law in chosen.items() if isinstance(law, ShareLaw)}
        if all(law.gamma > 0 for law in usable.values()):
            shares = solve(usable)
            drawn.append([shares[name] for name in laws])
    edges = ends(np.array(drawn), LEVEL).T.tolist() if drawn else [(math.nan,) * 2] * len(laws)
    advice = {}
    for (name, law), (low, high) in zip(laws.items(), edges, strict=True):
        share = best[name]
        cap = max_epochs * (unique_tokens or {}).get(name, math.inf) / tokens
        advice[name] = Advice(
            share=share,
            interval=(low, high),
            loss=float(law.loss(params, tokens, share)),
            transferred_tokens=law.transferred_tokens(params, tokens, share),
            is_capped=share >= cap * (1 - 1e-9),
        )
    return advice
