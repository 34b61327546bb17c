"""Copies that must be equal: each device fingerprints its part of what several hold, and the numbers are compared.

Data parallelism never compares them by itself. The gradients of all copies are the same, so a bit that flipped in one
copy stays there, and each device trains a model of its own (BLOOM's LayerNorms drifted apart between tensor ranks).
"""

import collections
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bloomjax import job
from bloomjax.checkpoints import _leaf_fingerprint
from bloomjax.errors import BadInput


class ReplicaCheck:
    """Compares the copies of parameters, optimizer moments and counters, bit by bit, across the mesh.

    A leaf is compared along the mesh axes that do not split it; one of which each device holds a part of its own has
    no copy to compare with. The embedding is one tensor for input and output, so that these cannot drift apart.
    """

    def __init__(self, *, every_steps: int | None = 100):
        """None: never."""
        if every_steps is not None and every_steps < 1:
            raise BadInput(
                f"ReplicaCheck.every_steps must be at least 1 or None, got {every_steps}"
            )
        self.every_steps = every_steps
        self._names: list[str] = []  # of the leaves that are compared
        self._numbers: list[int] = []  # of these among all leaves
        self._free_axes: list[
            list[int]
        ] = []  # of the mesh: those along which each of them is copied
        self._devices = np.empty(0, object)
        self._hosts: list[str] = []
        self._program: Any = None

    def prepare(self, abstract_state: Any) -> None:
        """Compiles the comparison for arrays of these shapes and NamedShardings, all of one mesh.

        Every process calls it.
        """
        leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
        mesh = leaves[0][1].sharding.mesh
        self._names, self._numbers, self._free_axes = [], [], []
        for number, (path, leaf) in enumerate(leaves):
            free = _free_axes(leaf.sharding)
            if math.prod(mesh.devices.shape[axis] for axis in free) > 1:
                self._names.append(jax.tree_util.keystr(path))
                self._numbers.append(number)
                self._free_axes.append(free)
        self._devices = mesh.devices
        self._hosts = job.gather(os.uname().nodename)
        self._program = None
        if self.every_steps is None or not self._names:
            return

        def of_a_device(*parts):
            found = jnp.stack([_leaf_fingerprint(part) for part in parts])
            return found.reshape((1,) * mesh.devices.ndim + found.shape)

        arrays = [leaves[number][1] for number in self._numbers]
        program = jax.shard_map(
            of_a_device, mesh=mesh, in_specs=tuple(a.sharding.spec for a in arrays),
            out_specs=PartitionSpec(*mesh.axis_names), check_vma=False,
        )  # fmt: skip
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._program = jax.jit(program, out_shardings=everywhere).lower(*arrays).compile()

    def is_due(self, step: int) -> bool:
        """Whether the copies are compared after this step; never where there are none."""
        return self._program is not None and step % (self.every_steps or 1) == 0

    def differences(self, state: Any) -> list[dict[str, Any]]:
        """The copies that differ: {"leaf", "device", "process", "host", "copies"}; empty if none does.

        `copies` is how many devices hold the same part of the leaf. Those in the minority are named; where there is no
        majority, as of two that differ, all of them. Every process calls it, and gets the same.
        """
        if self._program is None:
            return []
        leaves = jax.tree.leaves(state)
        fingerprints = np.asarray(self._program(*(leaves[number] for number in self._numbers)))
        found = []
        for n, (name, free) in enumerate(zip(self._names, self._free_axes, strict=True)):
            values = _grouped(fingerprints[..., n], free)
            devices = _grouped(self._devices, free)
            for group in np.flatnonzero((values != values[:, :1]).any(axis=1)):
                for copy in _minority(values[group].tolist()):
                    device = devices[group, copy]
                    found.append({
                        "leaf": name, "device": device.id, "process": device.process_index,
                        "host": self._hosts[device.process_index], "copies": values.shape[1],
                    })  # fmt: skip
        return found


def _free_axes(sharding: NamedSharding) -> list[int]:
    """Numbers of the mesh axes over which an array is not split."""
    used: set[str] = set()
    for entry in sharding.spec:
        used |= {entry} if isinstance(entry, str) else set(entry or ())
    return [n for n, name in enumerate(sharding.mesh.axis_names) if name not in used]


def _grouped(of_mesh: np.ndarray, free: list[int]) -> np.ndarray:
    """An array of the mesh's shape as [parts of a leaf, copies of each]."""
    ends = list(range(of_mesh.ndim - len(free), of_mesh.ndim))
    num_copies = math.prod(of_mesh.shape[axis] for axis in free)
    return np.moveaxis(of_mesh, free, ends).reshape(-1, num_copies)


def _minority(values: list[int]) -> list[int]:
    """Places of those that differ from the most common value; all places if two values are equally common."""
    (value, count), (_, next_count) = collections.Counter(values).most_common(2)
    return [n for n, each in enumerate(values) if each != value or count == next_count]
