"""One training step as a function of (model, optimizer, mesh, batch shape): what train runs and plan compiles.

Nothing here asks for devices or makes an array; the mesh may be of absent ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import float8, partitioning
from bloomjax.embedding import head_table
from bloomjax.errors import BadInput
from bloomjax.losses import linear_cross_entropy
from bloomjax.model import Bloom
from bloomjax.optimizer import SkippingTransformation
from bloomjax.train_state import TrainState, init_state, state_of

# tokens: int32 [B, L + 1]; weights: float32 [B], 0 for rows that only fill the mesh.
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step is computed; only z_loss changes what.

    Attributes:
      microbatch_size_samples: rows a batch shard works on at a time, at most: its rows are dealt evenly to as many
        microbatches as that takes. None takes them all at once. Gradients are added up in float32, those of the layers'
        weights in BloomConfig.gradient_dtype.
      z_loss: weight of logsumexp^2.
      loss_chunk_tokens: tokens of one device whose logits exist at a time.
      compiler_options: XLA's, for the program of the train step; a name it does not know is an error.
    """

    microbatch_size_samples: int | None = None
    z_loss: float = 0.0
    loss_chunk_tokens: int = 1024
    compiler_options: Mapping[str, bool | int | str] | None = None

    def __post_init__(self):
        for name in ("microbatch_size_samples", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")

    def num_rows(self, num_samples: int, mesh: Mesh) -> int:
        """Rows of a batch of so many samples: as many for each batch shard and microbatch (`train` fills it up)."""
        num_shards = partitioning.num_batch_shards(mesh)
        rows = -(-num_samples // num_shards)
        num_microbatches = self.num_microbatches(rows)
        return num_shards * num_microbatches * -(-rows // num_microbatches)

    def num_microbatches(self, rows_of_a_shard: int) -> int:
        """In how many parts a batch shard works on its rows."""
        return -(-rows_of_a_shard // (self.microbatch_size_samples or rows_of_a_shard))


def abstract_batch(num_rows: int, sequence_length: int, mesh: Mesh) -> Batch:
    """Shapes and shardings of a batch."""
    rows = NamedSharding(mesh, PartitionSpec(partitioning.BATCH_AXES))
    return {
        "tokens": jax.ShapeDtypeStruct((num_rows, sequence_length + 1), jnp.int32, sharding=rows),
        "weights": jax.ShapeDtypeStruct((num_rows,), jnp.float32, sharding=rows),
    }


def row_losses(
    model: Bloom,
    options: StepOptions,
    params,
    batch: Batch,
    weights_BL,
    dropout_rng=None,
    slots=None,
):
    """Weighted loss sum (differentiable) and the loss in nats of each token [B, L]."""
    tokens = batch["tokens"]
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    x_BLD: Any = model.apply(
        {"params": params} | ({"slots": slots} if slots else {}),
        tokens[:, :-1],
        deterministic=dropout_rng is None,
        rngs=rngs,
    )
    return linear_cross_entropy(
        x_BLD,
        head_table(params),
        tokens[:, 1:],
        weights_BL,
        z_loss=options.z_loss,
        chunk_tokens=options.loss_chunk_tokens,
        num_tokens_in_vocab=model.config.num_valid_tokens,
    )


@jax.custom_vjp
def _used_often(x):
    """x, whose gradient is the sum over all its uses before anything is done with it: one all-reduce, one addition."""
    return x


_used_often.defvjp(lambda x: (x, None), lambda _, g: (g,))


def _differentiated(params, gradient_dtype: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """By path: the parameters whose gradients are asked for, and slots for those of the others, the layers' kernels, if
    they are to exist in another dtype (see dense.Dense)."""
    own: dict[Any, Any] = flatten_dict(params)
    if gradient_dtype == "float32":
        return own, {}
    kernels = [path for path in own if path[-1] == "kernel"]
    return own, {path: jnp.zeros(own.pop(path).shape, gradient_dtype) for path in kernels}


def make_train_step(
    model: Bloom, optimizer: optax.GradientTransformation, options: StepOptions, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """train_step(state, batch, learning_rate, dropout_key, limits=None) -> (new state, {"loss", "grad_norm"}).

    The loss is the mean over tokens of rows of weight 1; filling rows and microbatches leave it and the gradient as
    they are. `grad_norm` is the global L2 norm before clipping. With `limits` (float32 [2], of loss and norm, finite) a
    step that is not within them leaves parameters and optimizer as they were, and "is_taken" says which it was.
    """
    config = model.config
    has_dropout = config.hidden_dropout_rate > 0 or config.attention_dropout_rate > 0

    def loss_of(differentiated, params, batch, token_weight, key):
        own, slots = differentiated
        params = unflatten_dict(flatten_dict(params) | own)
        params["embedding"] = _used_often(params["embedding"])
        weights_BL = jnp.broadcast_to(
            (batch["weights"] * token_weight)[:, None], (len(batch["weights"]), batch["tokens"].shape[1] - 1)
        )  # fmt: skip
        slots = unflatten_dict(slots)
        return row_losses(model, options, params, batch, weights_BL, key, slots)[0]

    def loss_and_grads(params, batch, token_weight, key):
        num_rows = batch["tokens"].shape[0] // partitioning.num_batch_shards(mesh)
        num_microbatches = options.num_microbatches(num_rows)
        differentiated = _differentiated(params, config.gradient_dtype)
        if num_microbatches == 1:
            loss, grads = jax.value_and_grad(loss_of)(
                differentiated, params, batch, token_weight, key
            )
        else:
            loss, grads = accumulate(
                differentiated, params, batch, token_weight, key, num_microbatches
            )
        grads = unflatten_dict(grads[0] | grads[1])
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def train_step(state, batch, learning_rate, dropout_key, limits=None):
        num_rows, length = batch["tokens"].shape
        token_weight = 1.0 / (jnp.sum(batch["weights"]) * (length - 1))
        key = jax.random.fold_in(dropout_key, state.step) if has_dropout else None
        if options.num_rows(num_rows, mesh) != num_rows:
            raise ValueError(f"{num_rows} rows cannot be dealt evenly to this mesh and microbatch")
        loss, grads = loss_and_grads(state.params, batch, token_weight, key)
        with jax.named_scope("optimizer"):
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
            extra = {}
            if limits is not None:
                is_taken = (loss <= limits[0]) & (metrics["grad_norm"] <= limits[1])  # a NaN is not
                metrics["is_taken"] = is_taken
                keep = functools.partial(jax.tree.map, functools.partial(jnp.where, is_taken))
                if isinstance(optimizer, SkippingTransformation):
                    extra["is_taken"] = is_taken
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
            if limits is not None:
                params = keep(params, state.params)
                opt_state = opt_state if extra else keep(opt_state, state.opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    def accumulate(differentiated, params, batch, token_weight, key, num_microbatches):
        # Row r goes to microbatch r % M, so that each device splits its own rows and none move.
        def split(a):
            a = a.reshape(a.shape[0] // num_microbatches, num_microbatches, *a.shape[1:])
            return jnp.swapaxes(a, 0, 1)

        def body(total, inputs):
            number, microbatch = inputs
            microbatch = {k: partitioning.constrain_activation(v, "batch", *(None,) * (v.ndim - 1))
                          for k, v in microbatch.items()}  # fmt: skip
            micro_key = None if key is None else jax.random.fold_in(key, number)
            loss, vjp = jax.vjp(
                lambda d: loss_of(d, params, microbatch, token_weight, micro_key), differentiated
            )
            vjp.with_refs(grads)(jnp.ones_like(loss))
            return total + loss, None

        # Gradients are added in place, each as soon as it is known: no second set of them exists.
        grads = jax.tree.map(lambda a: jax.new_ref(jnp.zeros_like(a)), differentiated)
        inputs = (jnp.arange(num_microbatches), jax.tree.map(split, batch))
        total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), inputs)
        return total, jax.tree.map(jax.freeze, grads)

    return train_step


def make_eval_step(model: Bloom, options: StepOptions) -> Callable[[Any, Batch], jax.Array]:
    """eval_step(params, batch) -> mean loss in nats a token of each row, float32 [B]."""

    def eval_step(params, batch):
        B, length = batch["tokens"].shape
        _, nll_BL = row_losses(
            model, options, params, batch, jnp.ones((B, length - 1), jnp.float32)
        )
        return jnp.mean(nll_BL, axis=1)

    return eval_step


def jit_programs(
    model: Bloom,
    optimizer: optax.GradientTransformation,
    step: StepOptions,
    mesh: Mesh,
    abstract: TrainState,
) -> tuple[Callable[..., Any], ...]:
    """init(seed), from_params (imported ones), train_step and eval_step, with the shardings of `abstract`; from_params
    and train_step take their first argument away. BadInput if the devices cannot do model.config.matmul_dtype."""
    if model.config.matmul_dtype == "float8" and isinstance(mesh, Mesh):  # else of no devices
        float8.check_devices(mesh.devices.flat, step.compiler_options)
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    replicated = NamedSharding(mesh, PartitionSpec())
    init = jax.jit(functools.partial(init_state, model, optimizer), out_shardings=state_shardings)
    from_params = jax.jit(
        functools.partial(state_of, optimizer), donate_argnums=0, out_shardings=state_shardings
    )
    train_step = jax.jit(
        make_train_step(model, optimizer, step, mesh),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated),
        compiler_options=dict(step.compiler_options or {}) or None,
    )
    eval_step = jax.jit(make_eval_step(model, step), out_shardings=replicated)
    return init, from_params, train_step, eval_step
