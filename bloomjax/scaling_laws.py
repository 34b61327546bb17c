"""Scaling laws: loss of a model of N parameters after D tokens, the optima a law advises, and the published constants.

C = 6ND throughout: FLOPs of training N parameters on D tokens. N is what the law was fitted on: all parameters for
Chinchilla, those outside the embedding for Kaplan.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import optimize

from bloomjax.errors import BadInput

FLOPS_PER_PARAM_TOKEN = 6.0
PETAFLOP_DAY_FLOPS = 8.64e19


class Optimum(NamedTuple):
    """The model and the number of tokens that a law advises; loss in nats a token, None if the law has none."""

    params: float
    tokens: float
    flops: float
    loss: float | None


class Law(Protocol):
    """What every law can tell: the best use of a compute budget, and the budget for which a size or length is best."""

    def optimum(self, flops: float) -> Optimum: ...
    def optimum_of_params(self, params: float) -> Optimum: ...
    def optimum_of_tokens(self, tokens: float) -> Optimum: ...


class LossLaw(Law, Protocol):
    """A law that also says which loss a run of N parameters and D tokens ends with."""

    def loss(self, params: Any, tokens: Any) -> Any: ...
    def params_for(self, loss: float, tokens: float) -> float: ...


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise BadInput(f"{name} must be a number above 0, got {value}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3). Nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: Any, tokens: Any) -> Any:
        """Loss; scalars or arrays that broadcast."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def params_for(self, loss: float, tokens: float) -> float:
        """Size that ends at `loss` after `tokens`; inf if only an endless model would, 0 if any would be too good."""
        return _inverse(loss - self.E - self.B * tokens**-self.beta, self.A, self.alpha)

    def tokens_for(self, loss: float, params: float) -> float:
        """Tokens after which `params` reach `loss`; inf if never."""
        return _inverse(loss - self.E - self.A * params**-self.alpha, self.B, self.beta)

    @property
    def params_exponent(self) -> float:
        """a of N_opt ~ C^a, which is beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def _scale(self) -> float:
        if not min(self.A, self.B, self.alpha, self.beta) > 0:
            raise BadInput(f"{self} advises no size: A, B, alpha and beta must be above 0")
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimum(self, flops: float) -> Optimum:
        """N = G (C/6)^a, D = (C/6)^b / G with G = (alpha A / (beta B))^(1 / (alpha + beta))."""
        product = _positive("flops", flops) / FLOPS_PER_PARAM_TOKEN
        params = self._scale * product**self.params_exponent
        return Optimum(params, product / params, flops, float(self.loss(params, product / params)))

    def optimum_of_params(self, params: float) -> Optimum:
        """The budget for which `params` is the best size."""
        product = (_positive("params", params) / self._scale) ** (1 / self.params_exponent)
        return self.optimum(FLOPS_PER_PARAM_TOKEN * product)

    def optimum_of_tokens(self, tokens: float) -> Optimum:
        """The budget for which `tokens` is the best length."""
        product = (_positive("tokens", tokens) * self._scale) ** (1 / (1 - self.params_exponent))
        return self.optimum(FLOPS_PER_PARAM_TOKEN * product)


def _inverse(excess: float, coefficient: float, exponent: float) -> float:
    """x with coefficient / x^exponent = excess."""
    if excess <= 0:
        return math.inf
    return float((coefficient / excess) ** (1 / exponent))


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """(scale / x)^exponent; inverted, Kaplan's critical batch B* / L^(1/alpha_B)."""

    scale: float
    exponent: float

    def __call__(self, x: Any) -> Any:
        return (self.scale / x) ** self.exponent

    def inverse(self, value: float) -> float:
        """The x that gives `value`."""
        return float(self.scale / value ** (1 / self.exponent))


@dataclasses.dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D (Kaplan et al. 2020, arXiv 2001.08361)."""

    alpha_N: float
    N_c: float
    alpha_D: float
    D_c: float

    @property
    def _ratio(self) -> float:
        return self.alpha_N / self.alpha_D

    def loss(self, params: Any, tokens: Any) -> Any:
        """Loss in nats a token; scalars or arrays that broadcast. `params` without the embedding."""
        return ((self.N_c / params) ** self._ratio + self.D_c / tokens) ** self.alpha_D

    def params_for(self, loss: float, tokens: float) -> float:
        """Size that ends at `loss` after `tokens`; inf if only an endless model would."""
        excess = loss ** (1 / self.alpha_D) - self.D_c / tokens
        return _inverse(excess, self.N_c**self._ratio, self._ratio)

    @property
    def params_exponent(self) -> float:
        """a of N_opt ~ C^a where C = 6ND is all that counts: alpha_D / (alpha_N + alpha_D)."""
        return 1 / (1 + self._ratio)

    @property
    def _scale(self) -> float:
        if not min(self.alpha_N, self.alpha_D) > 0:
            raise BadInput(f"{self} advises no size: alpha_N and alpha_D must be above 0")
        # The derivative of both terms along ND = const: ratio (N_c/N)^ratio = D_c/D.
        return (self._ratio * self.N_c**self._ratio / self.D_c) ** self.params_exponent

    def optimum(self, flops: float) -> Optimum:
        """Best N and D of C = 6ND."""
        product = _positive("flops", flops) / FLOPS_PER_PARAM_TOKEN
        params = self._scale * product**self.params_exponent
        return Optimum(params, product / params, flops, float(self.loss(params, product / params)))

    def optimum_of_params(self, params: float) -> Optimum:
        product = (_positive("params", params) / self._scale) ** (1 / self.params_exponent)
        return self.optimum(FLOPS_PER_PARAM_TOKEN * product)

    def optimum_of_tokens(self, tokens: float) -> Optimum:
        product = (_positive("tokens", tokens) * self._scale) ** (1 / (1 - self.params_exponent))
        return self.optimum(FLOPS_PER_PARAM_TOKEN * product)


@dataclasses.dataclass(frozen=True)
class FrontierLaw:
    """N_opt = params_coefficient C^params_exponent and the same for D: what approaches 1 and 2 of Chinchilla give."""

    params_coefficient: float
    params_exponent: float
    tokens_coefficient: float
    tokens_exponent: float

    @classmethod
    def of_params(cls, coefficient: float, exponent: float) -> "FrontierLaw":
        """The law of N alone; D = C / 6N."""
        return cls(coefficient, exponent, 1 / (FLOPS_PER_PARAM_TOKEN * coefficient), 1 - exponent)

    def optimum(self, flops: float) -> Optimum:
        params = self.params_coefficient * _positive("flops", flops) ** self.params_exponent
        tokens = self.tokens_coefficient * flops**self.tokens_exponent
        return Optimum(params, tokens, flops, None)

    def optimum_of_params(self, params: float) -> Optimum:
        flops = (_positive("params", params) / self.params_coefficient) ** (
            1 / self.params_exponent
        )
        return self.optimum(flops)

    def optimum_of_tokens(self, tokens: float) -> Optimum:
        flops = (_positive("tokens", tokens) / self.tokens_coefficient) ** (
            1 / self.tokens_exponent
        )
        return self.optimum(flops)


@dataclasses.dataclass(frozen=True)
class DataConstrainedLaw:
    """Repeated tokens and excess parameters count less and less (Muennighoff et al. 2023, arXiv 2305.16264).

    U unique tokens seen D / U = 1 + R times are worth U + U R* (1 - exp(-R / R*)); parameters beyond what suits U
    unique tokens likewise, with `params_decay`. `tokens_decay` is R*_D (15.4), `params_decay` R*_N (5.3).
    """

    base: ParametricLaw
    tokens_decay: float
    params_decay: float

    def effective_tokens(self, tokens: Any, unique_tokens: Any) -> Any:
        unique = np.minimum(unique_tokens, tokens)
        return unique + unique * _decayed(tokens / unique - 1, self.tokens_decay)

    def effective_params(self, params: Any, unique_tokens: Any) -> Any:
        """Of `params`, where `unique_tokens` would be enough for the size that suits them."""
        base = self.base
        suited = base._scale * (unique_tokens * base._scale) ** (base.beta / base.alpha)
        suited = np.minimum(params, suited)
        return suited + suited * _decayed(params / suited - 1, self.params_decay)

    def loss(self, params: Any, tokens: Any, unique_tokens: Any) -> Any:
        unique = np.minimum(unique_tokens, tokens)
        return self.base.loss(
            self.effective_params(params, unique), self.effective_tokens(tokens, unique)
        )

    def optimum(self, flops: float, unique_tokens: float) -> Optimum:
        """The best size and length when there are only `unique_tokens`; found numerically."""
        product = _positive("flops", flops) / FLOPS_PER_PARAM_TOKEN
        unique = _positive("unique_tokens", unique_tokens)
        # More epochs never help a smaller model than the unconstrained one by more than this range.
        middle = math.log(self.base.optimum(flops).params)
        grid = np.linspace(middle - 12, middle + 3, 601)

        def loss(log_params: Any) -> Any:
            return self.loss(np.exp(log_params), product / np.exp(log_params), unique)

        best = float(grid[np.argmin(loss(grid))])
        found = optimize.minimize_scalar(
            loss, bounds=(best - 0.05, best + 0.05), method="bounded", options={"xatol": 1e-9}
        )
        params = math.exp(found.x)
        return Optimum(params, product / params, flops, float(found.fun))


def _decayed(repeats: Any, decay: float) -> Any:
    repeats = np.maximum(repeats, 0.0)
    return -decay * np.expm1(-repeats / decay)


@dataclasses.dataclass(frozen=True)
class ShareLaw:
    """(E + A / N^alpha + B / D^beta) p^-gamma: loss of a language with share p of D tokens.

    He et al. 2024 (arXiv 2410.12883) found it for language families; the base is the language alone, p = 1.
    """

    base: ParametricLaw
    gamma: float

    def loss(self, params: Any, tokens: Any, share: Any) -> Any:
        return self.base.loss(params, tokens) * share**-self.gamma

    def effective_tokens(self, params: float, tokens: float, share: float) -> float:
        """Tokens of the language alone that would bring `params` to the same loss."""
        return self.base.tokens_for(float(self.loss(params, tokens, share)), params)

    def transferred_tokens(self, params: float, tokens: float, share: float) -> float:
        """What the other languages are worth, in tokens of this one; below 0 they disturb.

        Hernandez et al. 2021 (arXiv 2102.01293) define effective data transferred so, from pre-training to fine-tuning;
        taking it from the other languages of one mixture is our use of it.
        """
        return self.effective_tokens(params, tokens, share) - share * tokens


# ---- batch ----


class BatchCost(NamedTuple):
    """What a batch costs against the two extremes: times as many tokens, times as many steps as the fewest."""

    tokens_factor: float
    steps_factor: float


def batch_cost(batch_tokens: float, critical_batch_tokens: float) -> BatchCost:
    """E / E_min = 1 + B / B_crit and S / S_min = 1 + B_crit / B (McCandlish et al. 2018, arXiv 1812.06162)."""
    ratio = _positive("batch_tokens", batch_tokens) / _positive(
        "critical_batch_tokens", critical_batch_tokens
    )
    return BatchCost(1 + ratio, 1 + 1 / ratio)


# ---- published constants ----

# arXiv 2203.15556; unrounded in a comment of its TeX source, which Besiroglu et al. 2024 (arXiv 2404.10102) quote.
CHINCHILLA = ParametricLaw(
    E=math.exp(0.5267228),
    A=math.exp(6.0073404),
    B=math.exp(6.0179186),
    alpha=0.33917084,
    beta=0.2849083,
)
CHINCHILLA_ROUNDED = ParametricLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BESIROGLU = ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # 2404.10102

# Of 2001.08361, non-embedding parameters: the critical batch in tokens, of the loss.
KAPLAN_BATCH = PowerLaw(2.1e8, 0.21)
KAPLAN = KaplanLaw(alpha_N=0.076, N_c=6.4e13, alpha_D=0.103, D_c=1.8e13)  # the joint fit, Table 2
# N = 1.3e9 C_min^0.73, D = 2.0e10 C_min^0.27, C_min in PF-days. C_min is the compute at a tiny batch, D the tokens at
# the critical batch, which costs twice that (6ND is 1.8 C_min, by the rounding): a budget is what the run costs, 6ND.
KAPLAN_FRONTIER = FrontierLaw.of_params(
    1.3e9 / (FLOPS_PER_PARAM_TOKEN * 1.3e9 * 2.0e10) ** 0.73, 0.73
)

# 2305.16264, its repository huggingface/datablations.
DATA_CONSTRAINED = DataConstrainedLaw(
    ParametricLaw(
        E=math.exp(0.6254804),
        A=math.exp(6.255414),
        B=math.exp(7.3049974),
        alpha=0.3526596,
        beta=0.3526596,
    ),
    tokens_decay=15.387756,
    params_decay=5.309743,
)


class TableRow(NamedTuple):
    """A row of Table 3 (approach 1) or A3 (approaches 2 and 3) of arXiv 2203.15556."""

    approach: int
    params: float
    flops: float
    tokens: float


_PARAMS = (400e6, 1e9, 10e9, 67e9, 175e9, 280e9, 520e9, 1e12, 10e12)
_TABLES = {
    1: (
        (1.92e19, 1.21e20, 1.23e22, 5.76e23, 3.85e24, 9.90e24, 3.43e25, 1.27e26, 1.30e28),
        (8.0e9, 20.2e9, 205.1e9, 1.5e12, 3.7e12, 5.9e12, 11.0e12, 21.2e12, 216.2e12),
    ),
    2: (
        (1.84e19, 1.20e20, 1.32e22, 6.88e23, 4.54e24, 1.18e25, 4.19e25, 1.59e26, 1.75e28),
        (7.7e9, 20.0e9, 219.5e9, 1.7e12, 4.3e12, 7.1e12, 13.4e12, 26.5e12, 292.0e12),
    ),
    3: (
        (2.21e19, 1.62e20, 2.46e22, 1.71e24, 1.26e24, 3.52e25, 1.36e26, 5.65e26, 8.55e28),
        (9.2e9, 27.1e9, 410.1e9, 4.1e12, 12.0e12, 20.1e12, 43.5e12, 94.1e12, 1425.5e12),
    ),
}
CHINCHILLA_TABLE = tuple(
    TableRow(approach, *row)
    for approach, columns in _TABLES.items()
    for row in zip(_PARAMS, *columns, strict=True)
)


def table_law(approach: int) -> FrontierLaw:
    """Approach 1 or 2 as a power law, fitted to its published rows: the paper gives no coefficients."""
    rows = [row for row in CHINCHILLA_TABLE if row.approach == approach]
    logs = np.log([(row.flops, row.params) for row in rows])
    exponent, intercept = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return FrontierLaw.of_params(math.exp(intercept), float(exponent))


# Compute of the runs behind each published law, smallest and largest.
CHINCHILLA_FLOPS = (6e18, 3e21)


def named_laws(name: str) -> dict[str, Law]:
    """The laws that go by a published name, each with what it is called there. BadInput for other names."""
    laws: dict[str, dict[str, Law]] = {
        "chinchilla": {
            "approach 1": table_law(1),
            "approach 2": table_law(2),
            "approach 3": CHINCHILLA,
        },
        "chinchilla_rounded": {"approach 3": CHINCHILLA_ROUNDED},
        "besiroglu": {"approach 3, refitted": BESIROGLU},
        "kaplan": {"frontier": KAPLAN_FRONTIER},
    }
    if name not in laws:
        raise BadInput(f"no law {name!r}; there are: {', '.join(laws)}, and files of `fit --json`")
    return laws[name]
