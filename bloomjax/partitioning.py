"""The device mesh, the rules from logical axes to mesh axes, and sharding constraints by logical name.

Mesh axes, outermost first: `data` (whole replicas; the only axis that may cross slow links), `fsdp` (parameters and
optimizer state are split, gathered in the compute dtype for use), `tensor` (heads, MLP, vocabulary, and the sequence
of the residual stream).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from bloomjax.errors import BadInput

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# A logical axis that stands in neither table is an error: nothing is replicated by accident.
PARAMETER_RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "qkv": None,
    "gate": None,
    "kv": None,
    "positions": None,
    "norm": None,  # LayerNorms and biases of emb_dim: too small to be worth a gather
    "layers": None,
}
ACTIVATION_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": None,
    "residual_length": "tensor",
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "qkv": None,
    "gate": None,
    "kv": None,
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; at most one may be -1 and takes all that remain."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (all of the job's by default). BadInput if their number does not fit."""
        devices = list(jax.devices() if devices is None else devices)
        sizes = [self.data, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise BadInput(f"{self}: sizes are positive, and at most one of them is -1")
        known = int(np.prod([size for size in sizes if size != -1]))
        if len(devices) % known or (-1 not in sizes and known != len(devices)):
            raise BadInput(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not fit the "
                f"{len(devices)} devices of this job (set --gin.MeshShape.data, .fsdp, .tensor)"
            )
        shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
        return Mesh(_arrange(devices, shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """`devices` in this shape, neighbours of an axis on the fastest links there are; slices along `data`."""
    num_slices = 1  # of a TPU pod; on GPUs JAX numbers hosts so
    if devices[0].platform == "tpu":
        num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % num_slices:
        raise BadInput(
            f"mesh axis data={shape[0]} must be a multiple of the {num_slices} slices of this job: only `data` may "
            "cross the network between them (set --gin.MeshShape.data)"
        )
    inside = (shape[0] // num_slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        inside, (num_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _spec(names: Sequence[str | None], rules: dict, kind: str) -> PartitionSpec:
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise BadInput(f"no {kind} rule for logical axes {unknown}; there are: {', '.join(rules)}")
    return PartitionSpec(*(None if name is None else rules[name] for name in names))


def parameter_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Where a parameter with these logical axes lives (master weights, gradients, optimizer state)."""
    return _spec(names, PARAMETER_RULES, "parameter")


def gathered_spec(names: Sequence[str | None]) -> PartitionSpec:
    """The same parameter where it is used: whole over `fsdp`, still split over `tensor`."""
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in parameter_spec(names)))


def activation_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Where an activation with these logical axes lives."""
    return _spec(names, ACTIVATION_RULES, "activation")


def on_mesh() -> bool:
    """Whether the mesh of `jax.set_mesh` has several devices; shard_map over one costs copies (10 % of a CPU step)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def is_split(names: Sequence[str | None]) -> bool:
    """Whether the mesh of `jax.set_mesh` splits, where it is used, a parameter dimension with one of these names."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis for axis in gathered_spec(names) if axis is not None}
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in axes)


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` with this layout over the mesh of `jax.set_mesh`; unchanged when there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_activation(x: jax.Array, *names: str | None) -> jax.Array:
    """`constrain` with the layout of an activation whose dimensions have these logical names."""
    return constrain(x, activation_spec(names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x, names, cotangent_names):
    del cotangent_names
    return constrain_activation(x, *names)


_reshard.defvjp(
    lambda x, names, cotangent_names: (_reshard(x, names, cotangent_names), None),
    lambda names, cotangent_names, _, g: (constrain_activation(g, *cotangent_names),),
)
_WHOLE, _SPLIT = ("batch", "length", "embed"), ("batch", "residual_length", "embed")


def gather_length(x_BLD: jax.Array) -> jax.Array:
    """From the residual stream, whose length is split over `tensor`, to whole windows; the gradient goes the other way.

    A plain constraint would be one on the gradient too, and keep it whole: an all-reduce instead of a reduce-scatter.
    """
    if not on_mesh():
        return x_BLD
    # The barrier keeps XLA from gathering what x was converted from, in float32.
    return _reshard(jax.lax.optimization_barrier(x_BLD), _WHOLE, _SPLIT)


def scatter_length(x_BLD: jax.Array) -> jax.Array:
    """From whole windows (or parts of their sum on each device) to the residual stream; the gradient is gathered."""
    return _reshard(x_BLD, _SPLIT, _WHOLE)


def check_divisible(mesh: Mesh, *, sequence_length: int, **dims: int) -> None:
    """BadInput unless the mesh divides the model: `dims` are vocab_size, emb_dim, num_heads, mlp_dim.

    The message names the dimension, the axis and the nearest sizes that would do.
    """
    axis_of = {"vocab_size": "tensor", "num_heads": "tensor", "mlp_dim": "tensor", "emb_dim": "fsdp",
               "sequence_length": "tensor"}  # fmt: skip
    for name, dim in {**dims, "sequence_length": sequence_length}.items():
        size = mesh.shape[axis_of[name]]
        if dim % size:
            fits = [n for n in range(1, 2 * size + 1) if dim % n == 0]
            near = sorted(fits, key=lambda n: abs(n - size))[:2]
            raise BadInput(
                f"{name}={dim} cannot be split over mesh axis {axis_of[name]}={size}; "
                f"the nearest sizes that divide it are {' and '.join(map(str, sorted(near)))}"
            )
