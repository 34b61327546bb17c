"""Does what a model computes keep its size as the model gets wider? With muP it should, whatever is trained.

    python tools/coordinate_check.py --gin_file=tiny.gin --plot=coordinates.png

Trains a few steps at each width, in standard parametrization and in muP (arXiv 2203.03466, github.com/microsoft/mup),
and prints by how much each kind of activation has changed since the start, a row a kind and a column a width; `slope`
is the exponent of width. A change that grows blows up in a wider model, one that shrinks learns nothing there. Exit
code 2: with muP something is not flat.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import mup_plots
import numpy as np
import width_models
from absl import flags
from flax.traverse_util import flatten_dict

from bloomjax import config
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig

_FLAGS = flags.FlagValues()
_WIDTHS = flags.DEFINE_string("widths", "64,128,256,512", "Of emb_dim.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 10, "Of training.", lower_bound=1, flag_values=_FLAGS)
_SEEDS = flags.DEFINE_integer("seeds", 3, "To average over.", lower_bound=1, flag_values=_FLAGS)
_GROW = flags.DEFINE_enum(
    "grow", "head_dim", width_models.GROW, "With the width: heads' size or number.", flag_values=_FLAGS
)  # fmt: skip
_RATE = flags.DEFINE_float(
    "learning_rate", None, "Constant; the peak of the gin files by default.", flag_values=_FLAGS
)
_PARAMETRIZATIONS = flags.DEFINE_string(
    "parametrizations", "sp,mup", f"Of {', '.join(width_models.PARAMETRIZATIONS)}.", flag_values=_FLAGS
)  # fmt: skip
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.25, "Largest |slope| that is flat.", flag_values=_FLAGS
)
_PLOT = flags.DEFINE_string("plot", None, "Picture to write.", flag_values=_FLAGS)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=_FLAGS)

# `attention` is q.k before ALiBi and softmax, `mlp` what GELU gets, `residual` the sum after all layers.
KINDS = ("embedding", "q", "attention", "context", "mlp", "residual", "logits")
_PROBE_SAMPLES = 4
EXIT_NOT_FLAT = 2


def activations(model: Bloom, params: Any, tokens_BL: Any) -> dict[str, jax.Array]:
    """Each of KINDS, float32, from the forward pass of training: modules are listened to, not rebuilt."""

    def listen(next_fun, args, kwargs, context):
        module, result = context.module, next_fun(*args, **kwargs)
        found = {}
        if context.method_name == "_attend":
            q_BLHK, k_BLHK = args[:2]
            L, K = q_BLHK.shape[1], q_BLHK.shape[3]
            scores_BHLS = jnp.einsum("BLHK,BSHK->BHLS", q_BLHK, k_BLHK) / K**0.5
            seen = np.tril_indices(L)
            found = {"attention": scores_BHLS[:, :, *seen], "context": result}
        elif context.method_name == "__call__":
            name = {"embedding_norm": "embedding", "mlp_in": "mlp"}.get(module.name)
            found = {name: result} if name else {}
            if module.name == "qkv":
                found = {"q": result[:, :, 0]}  # before the multiplier, which belongs to q.k
            if module.name == "layers":
                found = {"residual": result[0]}
        for kind, value in found.items():
            module.sow("intermediates", kind, value)
        return result

    with nn.intercept_methods(listen):
        x_BLD, state = model.apply({"params": params}, tokens_BL, mutable=["intermediates"])
    found: dict[Any, Any] = flatten_dict(state["intermediates"])
    kept: dict[str, Any] = {path[-1]: value[0] for path, value in found.items()}
    kept["residual"] = kept["residual"][-1]  # the others are of all layers
    kept["logits"] = model.apply({"params": params}, x_BLD, method="logits")
    assert set(kept) == set(KINDS)
    return {kind: x.astype(jnp.float32) for kind, x in kept.items()}


def coordinates(
    base: width_models.Base, model: BloomConfig, num_steps: int, rate: float, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """{"size", "change"}: mean |x_t| and mean |x_t - x_0|, [steps + 1, KINDS], on the first samples of step 1."""
    training = width_models.Training(base, model)
    tokens_BL = training.tokens(1)[:_PROBE_SAMPLES, :-1]

    @jax.jit
    def measure(first, params):
        before, now = (activations(Bloom(model), each, tokens_BL) for each in (first, params))
        size = jnp.stack([jnp.mean(jnp.abs(now[kind])) for kind in KINDS])
        change = jnp.stack([jnp.mean(jnp.abs(now[kind] - before[kind])) for kind in KINDS])
        return jnp.stack([size, change])

    found = []
    for seed in seeds:
        first = None
        for state, _ in training.states(lambda _: rate, num_steps, seed):
            if first is None:  # a copy: the step takes the state away
                first = jax.tree.map(jnp.copy, state.params)
            found.append(np.asarray(measure(first, state.params)))
    mean = np.reshape(found, (len(seeds), num_steps + 1, 2, len(KINDS))).mean(axis=0)
    return {"size": mean[:, 0], "change": mean[:, 1]}


@dataclasses.dataclass(frozen=True)
class Check:
    """A parametrization at all widths. size, change: [widths, steps + 1, KINDS]."""

    parametrization: str
    widths: list[int]
    size: np.ndarray
    change: np.ndarray

    def slopes(self, what: str, step: int = -1) -> dict[str, float]:
        """Exponent of width of each kind's `what` after `step` steps, by default the last."""
        sizes = getattr(self, what)[:, step]
        return {kind: width_models.slope(self.widths, sizes[:, i]) for i, kind in enumerate(KINDS)}

    def not_flat(self, tolerance: float) -> dict[str, str]:
        """Why, by kind: it changes more, or less, in wider models, or it is larger there.

        That its size shrinks is no fault: q.k and logits of random weights are sums of random signs, and begin small.
        """
        found = {}
        for kind, change in self.slopes("change").items():
            size = self.slopes("size")[kind]
            if abs(change) > tolerance:
                found[kind] = f"its change {'grows' if change > 0 else 'shrinks'}"
            elif size > tolerance:
                found[kind] = "its size grows"
        return found


def report(check: Check, tolerance: float) -> list[str]:
    """The table for people."""
    num_steps = check.change.shape[1] - 1
    columns = "".join(f"{width:>10,}" for width in check.widths)
    lines = [
        f"{check.parametrization}: mean |x{num_steps} - x0| after {num_steps} steps",
        f"  {'':<10}{columns}     slope  size's",
    ]
    bad, size_slopes = check.not_flat(tolerance), check.slopes("size")
    for number, (kind, exponent) in enumerate(check.slopes("change").items()):
        row = "".join(f"{x:>10.3g}" for x in check.change[:, -1, number])
        verdict = f"  {bad[kind]}" if kind in bad else ""
        lines.append(f"  {kind:<10}{row}    {exponent:+.2f}   {size_slopes[kind]:+.2f}{verdict}")
    verdict = f"NOT FLAT: {', '.join(bad)}" if bad else "flat"
    return [*lines, f"  {verdict} (|slope| up to {tolerance:g} over a factor {_factor(check):g})"]


def _factor(check: Check) -> float:
    return check.widths[-1] / check.widths[0]


def as_json(checks: Sequence[Check], tolerance: float) -> str:
    """All numbers, by parametrization."""
    return json.dumps(
        {
            check.parametrization: {
                "widths": check.widths,
                "kinds": KINDS,
                "size": check.size.tolist(),
                "change": check.change.tolist(),
                "slope": check.slopes("change"),
                "size_slope": check.slopes("size"),
                "not_flat": check.not_flat(tolerance),
            }
            for check in checks
        }
    )


def coordinate_check() -> int:
    """What the flags ask for."""
    widths = width_models.parse_widths(_WIDTHS.value)
    names = width_models.parse_parametrizations(_PARAMETRIZATIONS.value)
    if _TOLERANCE.value <= 0 or (_RATE.value is not None and _RATE.value <= 0):
        raise BadInput("--tolerance and --learning_rate must be above 0")
    if _PLOT.value:
        mup_plots.check_path(_PLOT.value)
    base = width_models.read_base()
    rate = _RATE.value or base.learning_rate.peak
    seeds = range(base.seed, base.seed + _SEEDS.value)
    models = {name: [base.at(width, name, _GROW.value) for width in widths] for name in names}
    checks = []
    for name in names:
        found = [coordinates(base, model, _STEPS.value, rate, seeds) for model in models[name]]
        arrays = {what: np.stack([each[what] for each in found]) for what in ("size", "change")}
        checks.append(Check(name, widths, **arrays))
        if not _JSON.value:
            print("\n".join(report(checks[-1], _TOLERANCE.value)), flush=True)
    if _JSON.value:
        print(as_json(checks, _TOLERANCE.value))
    if _PLOT.value:
        mup_plots.plot_coordinates(checks, KINDS, _PLOT.value)
    bad = [c for c in checks if c.parametrization == "mup" and c.not_flat(_TOLERANCE.value)]
    return EXIT_NOT_FLAT if bad else 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    config.call(coordinate_check, argv, _FLAGS)


if __name__ == "__main__":
    main()
