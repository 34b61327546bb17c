"""Parameters, optimizer and step counter: their values before step 1, and their shapes and shardings on a mesh."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import partitioning
from bloomjax.errors import BadInput
from bloomjax.model import Bloom


@flax.struct.dataclass
class TrainState:
    """step: int32, finished steps. params: float32 master weights. opt_state: optax's, sharded like params."""

    step: Any
    params: Any
    opt_state: Any


def init_state(model: Bloom, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before step 1. Run it under jit with the shardings of `abstract_state`, so that no device holds all of
    it, and outside `jax.set_mesh`: one token cannot be split over a mesh. Values do not depend on the mesh.
    """
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(seed), tokens_BL))["params"]
    return state_of(optimizer, params)


def state_of(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state before step 1 with these parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_params(model: Bloom, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters; called outside `jax.set_mesh`.

    A parameter without logical axes, or with one that has no rule, is an error: nothing is replicated by accident.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def with_sharding(path, shape, names):
        if len(names) != len(shape.shape):
            raise BadInput(
                f"parameter {jax.tree_util.keystr(path)} of shape {shape.shape} has logical axes {tuple(names)}; "
                "each dimension needs one (flax.linen.with_logical_partitioning)"
            )
        sharding = NamedSharding(mesh, partitioning.parameter_spec(names))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    names = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(with_sharding, nn.unbox(boxed), names)


def abstract_state(model: Bloom, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; the optimizer's are those of the parameters it follows."""
    params = abstract_params(model, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def with_sharding(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: with_sharding(moment, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda count: with_sharding(count, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, params, opt_state)
