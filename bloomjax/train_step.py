"""One training step as a function of (model, optimizer, mesh, batch shape): what train runs and plan compiles.

Nothing here asks for devices or makes an array; the mesh may be of absent ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import float8, partitioning
from bloomjax.embedding import head_table
from bloomjax.errors import BadInput
from bloomjax.gradients import loss_and_gradient, loss_weights
from bloomjax.losses import linear_cross_entropy
from bloomjax.model import Bloom
from bloomjax.mup import widths_of
from bloomjax.objectives import CausalLM, Objective, filling
from bloomjax.optimizer import SkippingTransformation
from bloomjax.train_state import TrainState, init_state, state_of

# tokens: int32 [B, L + 1]; weights: float32 [B], 0 for rows that only fill the mesh, else mostly 1 (reweighting.py);
# token_weights, where tokens of a row weigh differently: float32 [B, L]; and what else an objective adds, [B, L].
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step is computed; only z_loss changes what.

    Attributes:
      microbatch_size_samples: rows a batch shard works on at a time, at most: its rows are dealt evenly to as many
        microbatches as that takes. None takes them all at once. Gradients are added up in float32, those of the layers'
        weights in BloomConfig.gradient_dtype.
      z_loss: weight of logsumexp^2.
      loss_chunk_tokens: tokens of one device whose logits exist at a time; None for `loss_chunks.chunk_tokens_for`.
      compiler_options: XLA's, for the program of the train step; a name it does not know is an error.
    """

    microbatch_size_samples: int | None = None
    z_loss: float = 0.0
    loss_chunk_tokens: int | None = None
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


def abstract_batch(
    num_rows: int,
    sequence_length: int,
    mesh: Mesh,
    objective: Objective = CausalLM(),  # noqa: B008 # immutable
    is_padded: bool = False,
) -> Batch:
    """Shapes and shardings of a batch. In padded ones each token has a weight."""
    rows = NamedSharding(mesh, PartitionSpec(partitioning.BATCH_AXES))
    like = filling(objective, sequence_length) | {"weights": np.float32(0)}
    if is_padded:
        like["token_weights"] = np.zeros(sequence_length, np.float32)
    return {
        name: jax.ShapeDtypeStruct((num_rows, *a.shape), a.dtype, sharding=rows)
        for name, a in like.items()
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
        documents_BL=batch.get("documents"),
        last_key_BL=batch.get("last_key"),
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


def make_gradient(model: Bloom, options: StepOptions) -> Callable[..., Any]:
    """gradient(params, batch, key, num_microbatches) -> what `loss_and_gradient` returns, of the mean over tokens, by
    the weights of their rows and, where an objective gives them, their own: filling rows and microbatches leave it as
    it is. `key` is for dropout; None for none."""

    def gradient(params, batch, key, num_microbatches):
        length = batch["tokens"].shape[1] - 1
        has_token_weights = "token_weights" in batch
        total = jnp.sum(loss_weights(batch)) * (1 if has_token_weights else length)
        token_weight = 1.0 / total

        def loss_fn(params, batch, key, slots):
            weights_B1 = (batch["weights"] * token_weight)[:, None]
            weights_BL = jnp.broadcast_to(weights_B1, (len(weights_B1), length))
            if has_token_weights:
                weights_BL = weights_BL * batch["token_weights"]
            return row_losses(model, options, params, batch, weights_BL, key, slots)[0]

        return loss_and_gradient(
            loss_fn, params, batch, key,
            num_microbatches=num_microbatches, gradient_dtype=model.config.gradient_dtype,
        )  # fmt: skip

    return gradient


def make_train_step(
    model: Bloom, optimizer: optax.GradientTransformation, options: StepOptions, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """train_step(state, batch, learning_rate, dropout_key, limits=None) -> (new state, metrics).

    `loss` is that of `make_gradient`, `grad_norm` the global L2 norm before clipping. With `limits` (float32 [2], of
    loss and norm, finite) a step that is not within them leaves parameters and optimizer as they were, and `is_taken`
    says which it was. With microbatches there are measures of the gradient's noise (gradients.loss_and_gradient).
    """
    config = model.config
    if config.mup and not isinstance(optimizer, SkippingTransformation):
        raise BadInput("BloomConfig.mup needs adamw: other optimizers do not take its rates")
    has_dropout = config.hidden_dropout_rate > 0 or config.attention_dropout_rate > 0
    gradient = make_gradient(model, options)

    def train_step(state, batch, learning_rate, dropout_key, limits=None):
        num_rows = batch["tokens"].shape[0]
        key = jax.random.fold_in(dropout_key, state.step) if has_dropout else None
        if options.num_rows(num_rows, mesh) != num_rows:
            raise ValueError(f"{num_rows} rows cannot be dealt evenly to this mesh and microbatch")
        rows_of_a_shard = num_rows // partitioning.num_batch_shards(mesh)
        num_microbatches = options.num_microbatches(rows_of_a_shard)
        loss, grads, metrics = gradient(state.params, batch, key, num_microbatches)
        with jax.named_scope("optimizer"):
            metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
            extra: Any = {"rates": widths_of(config).rates(state.params)} if config.mup else {}
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
                opt_state = opt_state if "is_taken" in extra else keep(opt_state, state.opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(model: Bloom, options: StepOptions) -> Callable[[Any, Batch], jax.Array]:
    """eval_step(params, batch) -> float32 [2, B]: the loss in nats of each row, summed by its tokens' weights, and the
    sum of these: their quotient is the row's mean, that of their sums over rows the mean over all targets."""

    def eval_step(params, batch):
        B, length = batch["tokens"].shape
        ones_BL = jnp.ones((B, length - 1), jnp.float32)
        _, nll_BL = row_losses(model, options, params, batch, ones_BL)
        weights_BL = batch.get("token_weights", ones_BL)
        return jnp.stack([jnp.sum(nll_BL * weights_BL, axis=1), jnp.sum(weights_BL, axis=1)])

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
