"""How long a step takes on hardware that nobody asked: an estimate from counted FLOPs and bytes and cited rates.

    compute    hardware FLOPs at the share of the peak that the best published step of a large model reached
    memory     bytes to and from the device's own memory, at its full rate
    network    bytes on each mesh axis, at the rate of the links that the axis runs over

Networks and memory hide behind compute, with one exception: on GPUs the gathers and scatters of `tensor` stand between
matrix products that need them. (The published shares of TPUs were measured with such traffic, those of GPUs without.)
So the step takes max(compute + tensor on GPUs, memory, each other axis); the sum of all is the bound without overlap.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from bloomjax.chips import Chip


class Traffic(Protocol):
    """What a kind of collective sends: `hlo.Collective` is one."""

    @property
    def kind(self) -> str: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def wire_bytes(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices as the network sees them. `sides` are those of a TPU slice's torus, empty for GPUs."""

    chip: Chip
    devices_per_host: int
    network_bytes_per_second: float  # of a host
    num_slices: int = 1
    sides: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step; `network_seconds` by mesh axes such as "fsdp" or "data+fsdp"."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: dict[str, float]
    exposed_seconds: float
    step_seconds: float
    no_overlap_seconds: float
    bound: str


def estimate(
    cluster: Cluster,
    mesh_shape: Mapping[str, int],
    *,
    hardware_flops: float,
    memory_bytes: float,
    traffic: Iterable[Traffic],
) -> Estimate:
    """The estimate from what one device does in one step: FLOPs, and bytes of memory and of each collective."""
    chip = cluster.chip
    compute = hardware_flops / (chip.peak_flops_per_second * chip.sustained_fraction)
    memory = memory_bytes / chip.memory_bytes_per_second
    network: dict[str, float] = {}
    for each in traffic:
        name = "+".join(each.axes)
        rate = bytes_per_second(cluster, mesh_shape, each.axes, each.kind == "send")
        seconds = each.wire_bytes / rate
        network[name] = network.get(name, 0.0) + seconds
    exposed = 0.0 if cluster.sides else network.get("tensor", 0.0)
    candidates = {"compute": compute + exposed, "memory": memory}
    candidates |= {f"network ({name})": s for name, s in network.items()}
    bound = max(candidates, key=lambda name: candidates[name])
    return Estimate(
        compute, memory, network, exposed, candidates[bound],
        compute + memory + sum(network.values()), bound,
    )  # fmt: skip


def bytes_per_second(
    cluster: Cluster, mesh_shape: Mapping[str, int], axes: Sequence[str], leaves_slice: bool = False
) -> float:
    """At which a device sends during a collective over these mesh axes, one direction, all devices at once.

    GPUs: a ring through G devices of a host leaves it once, so the D devices of a host share its network G to D; inside
    the host each has its own links. TPUs: two links for each side of the torus that the axes fill as a ring, one for
    a part of a side; the network of the hosts where they cross slices. Axes that are not known count as all of them.
    """
    chip = cluster.chip
    host_share = cluster.network_bytes_per_second * chip.link_fraction / cluster.devices_per_host
    if not set(axes) <= set(mesh_shape):
        axes = list(mesh_shape)
    if cluster.sides:
        if leaves_slice:
            return host_share
        links = _links(cluster, mesh_shape)
        return max(1, sum(links[axis] for axis in axes)) * chip.link_bytes_per_second * chip.link_fraction  # fmt: skip
    inside = chip.link_bytes_per_second * chip.link_fraction
    group = _group(mesh_shape, axes)
    on_first_host = sum(device < cluster.devices_per_host for device in group)
    if on_first_host == len(group):
        return inside
    return min(inside, host_share * on_first_host)


def _group(mesh_shape: Mapping[str, int], axes: Sequence[str]) -> list[int]:
    """Numbers of the devices that the first one meets along `axes`; devices count along the last axis first."""
    strides, stride = {}, 1
    for axis in reversed(list(mesh_shape)):
        strides[axis] = stride
        stride *= mesh_shape[axis]
    ranges = [range(0, strides[a] * mesh_shape[a], strides[a]) for a in axes]
    return [sum(position) for position in itertools.product(*ranges)]


def _links(cluster: Cluster, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    """Links of a device that each mesh axis runs over, whole sides of the torus first, as jax lays a mesh out."""
    left = dict(enumerate(cluster.sides))
    links = {}
    for axis in reversed(list(mesh_shape)):
        size = mesh_shape[axis] // (cluster.num_slices if axis == "data" else 1)
        whole = [
            sides
            for num in range(len(left), 0, -1)
            for sides in itertools.combinations(left, num)
            if math.prod(left[side] for side in sides) == size
        ]
        links[axis] = 0
        for side in whole[0] if whole and size > 1 else list(left):
            part = math.gcd(size, left[side])
            if part == 1:
                continue
            is_ring = part == cluster.sides[side] and cluster.wraps[side] and part > 2
            links[axis] += 2 if is_ring else 1
            left[side] //= part
            size //= part
    return links


def memory_bytes(
    *,
    params: float,
    gathered_params: float,
    num_microbatches: int,
    tokens: float,
    emb_dim: int,
    mlp_dim: int,
    num_layers: int,
    num_heads: int,
    vocab_size: int,
    sequence_length: int,
    num_tensor: int,
    passes: float,
    scores_in_memory: bool,
    num_mlp_inputs: int = 1,
) -> float:
    """Bytes that one device reads and writes in a step outside its matrix products' own reuse; rough, to a factor of 2.

    Args:
      params: of which this device holds the state; gathered_params: that it computes with (all over `tensor`).
      tokens: of its rows in a step. passes: forward passes that the step amounts to: 3, and 1 for recomputing all.
      scores_in_memory: attention writes its scores, as XLA's does; a kernel does not.
    """
    # AdamW reads parameter, gradient and two moments and writes three of them, in float32.
    optimizer = 28.0 * params
    # A microbatch writes bf16 weights twice (gathers), reads them three or four times, and writes, reads and adds
    # float32 gradients.
    weights = num_microbatches * gathered_params * (2 * 2 + 2 * passes + 4 * 4)
    # Forward, bf16: inputs and outputs of four matrix products and of what lies between (two norms, GELU, residuals).
    layer = 2.0 * (26 * emb_dim + (2 + 2 * num_mlp_inputs) * mlp_dim)
    activations = passes * num_layers * tokens * layer / num_tensor
    # Causal half, float32 scores: written, read by the softmax, probabilities written and read.
    scores = 2 * (4 + 2) * num_heads * sequence_length / 2 if scores_in_memory else 0.0
    attention = passes * num_layers * tokens * scores / num_tensor
    # float32 logits of a chunk: written, read for maximum, sum and gradient, and their bf16 gradient twice.
    logits = tokens * vocab_size / num_tensor * (4 * 4 + 2 * 3)
    return optimizer + weights + activations + attention + logits
