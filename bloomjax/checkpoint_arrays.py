"""The arrays of a checkpoint piece by piece, for export, import and tools, which never hold a model in memory."""

import contextlib
import dataclasses
import errno
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import unflatten_dict

from bloomjax import checkpoint_manifest
from bloomjax.checkpoints import (
    block_fingerprint,
    deleted_meanwhile,
    leaf_name,
    position_of,
    save_arguments,
    storage_spec,
)
from bloomjax.errors import BadInput

_FINGERPRINT_BYTES = 1 << 26


class ParamsReader:
    """Reads each parameter of one checkpoint once, in blocks of its first dimension, and checks what it read.

    Needs no mesh, no accelerator and no model in memory.
    """

    def __init__(self, checkpoint: Path, position: dict[str, Any]):
        """`checkpoint` is `checkpoints/<step>`; `position` was read from it (Checkpoints.read_position)."""
        self._checkpoint = checkpoint
        self._saved = position["fingerprints"]
        self._arrays: dict[tuple[str, ...], ts.TensorStore] = {}
        self._sums: dict[tuple[str, ...], int] = {}
        self._num_read: dict[tuple[str, ...], int] = {}

    def _open(self, path: tuple[str, ...]) -> ts.TensorStore:
        if path not in self._arrays:
            with self._damage(path):
                spec = storage_spec(self._checkpoint / "state", ("params", *path))
                self._arrays[path] = ts.open(spec, open=True, read=True).result()
        return self._arrays[path]

    def blocks(self, path: tuple[str, ...]) -> Iterator[tuple[int, int]]:
        """First and last + 1 row of the blocks in which the rows of a parameter were stored."""
        return _row_blocks(self._open(path))

    def read(self, path: tuple[str, ...], start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a parameter. BadInput if they cannot be read, or the last one shows damage."""
        array = self._open(path)
        with self._damage(path):
            block = np.ascontiguousarray(array[start:stop].read().result())
        self._sums[path] = (self._sums.get(path, 0) + _fingerprint(block, start)) % 2**32
        self._num_read[path] = self._num_read.get(path, 0) + stop - start
        if self._num_read[path] == array.shape[0]:
            if self._sums[path] != self._saved[leaf_name(path)]:
                with self._damage(path):
                    raise ValueError("content differs from its fingerprint")
        return block

    def check(self, path: tuple[str, ...]) -> None:
        """BadInput if a parameter, of which the first rows were read, is damaged: reads the others."""
        for start, stop in self.blocks(path):
            if start >= self._num_read[path]:
                self.read(path, start, stop)

    @contextlib.contextmanager
    def _damage(self, path: tuple[str, ...]) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, KeyError) as error:
            if not self._checkpoint.exists():
                raise BadInput(deleted_meanwhile(self._checkpoint)) from error
            text = " ".join(str(error).split())[:200]
            raise BadInput(
                f"checkpoint {self._checkpoint} is damaged: {'.'.join(path)}: {text}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Difference:
    """One array of two checkpoints.

    Attributes:
      name: as in their positions; kinds: dtype and shape in either, None where it is missing.
      max_difference: of the elements, as float64; None if the kinds differ. NaN if one has a NaN where the other
        has another value.
      num_equal, num_elements: how many have the same bits.
    """

    name: str
    kinds: tuple[str | None, str | None]
    max_difference: float | None
    num_equal: int
    num_elements: int

    @property
    def is_equal(self) -> bool:
        return self.kinds[0] == self.kinds[1] and self.num_equal == self.num_elements


def storage_path(name: str) -> tuple[str, ...]:
    """Where Orbax keeps the array of this name of a position: ".opt_state[0].mu['a']" is opt_state, 0, mu, a."""
    parts = re.findall(r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]", name)
    return tuple(next(part for part in each if part) for each in parts)


def _open_array(checkpoint: epath.Path, name: str) -> ts.TensorStore:
    spec = storage_spec(checkpoint / "state", storage_path(name))
    return ts.open(spec, open=True, read=True).result()


def _row_blocks(array: ts.TensorStore) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of the blocks in which the rows of an array were stored."""
    num_rows = array.shape[0]
    chunk = array.chunk_layout.read_chunk.shape
    step = num_rows
    if chunk and chunk[0]:
        step = chunk[0]
    return ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _blocks(array: ts.TensorStore) -> Iterator[tuple[int, np.ndarray]]:
    """First row and content of the blocks of an array; a number is one row."""
    if array.rank == 0:
        yield 0, np.asarray(array.read().result()).reshape(1)
        return
    for start, stop in _row_blocks(array):
        yield start, np.ascontiguousarray(array[start:stop].read().result())


def damaged_arrays(checkpoint: epath.Path, position: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and what is wrong, of each array of a checkpoint that is not as saved: reads all, needs no model."""
    for name, kind in position["arrays"].items():
        try:
            array = _open_array(checkpoint, name)
            found = f"{array.dtype.name}{list(array.shape)}"
            if found != kind:
                yield name, f"is {found}, {kind} was saved"
                continue
            total = sum(_fingerprint(block, start) for start, block in _blocks(array)) % 2**32
        except (ValueError, OSError, KeyError) as error:
            yield name, " ".join(str(error).split())[:200]
            continue
        if total != position["fingerprints"][name]:
            yield name, "content differs from its fingerprint"


def differences(
    checkpoints: tuple[epath.Path, epath.Path], kinds: tuple[dict[str, str], dict[str, str]]
) -> Iterator[Difference]:
    """Of all arrays of two checkpoints; `kinds` are the `arrays` of their positions. OSError, ValueError: damage."""
    for name in kinds[0] | kinds[1]:
        kind = kinds[0].get(name), kinds[1].get(name)
        if kind[0] != kind[1]:
            yield Difference(name, kind, None, 0, 0)
            continue
        mine, other = (_open_array(checkpoint, name) for checkpoint in checkpoints)
        num_equal = num_elements = 0
        largest = 0.0
        for start, a in _blocks(mine):
            whole = other if other.rank == 0 else other[start : start + len(a)]
            b = np.asarray(whole.read().result()).reshape(a.shape)
            unsigned = f"u{a.dtype.itemsize}"
            same = np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)
            num_equal += int(same.sum())
            num_elements += same.size
            if not same.all():
                gaps = np.abs(a[~same].astype(np.float64) - b[~same].astype(np.float64))
                largest = float(np.max([largest, gaps.max()]))
        yield Difference(name, kind, largest, num_equal, num_elements)


class ParamsWriter:
    """A checkpoint of step 0 that holds nothing but parameters, which arrive in blocks in any order.

    Until `save` they lie in files below `scratch`, mapped into memory, so that the kernel may drop what does not fit.
    """

    def __init__(self, scratch: Path, shapes: dict[tuple[str, ...], tuple[int, ...]]):
        """`shapes` of all parameters (float32) by their paths. OSError if the disk cannot hold them."""
        self._arrays: dict[tuple[str, ...], np.ndarray] = {}
        self._sums = dict.fromkeys(shapes, 0)
        scratch.mkdir()
        for number, (path, shape) in enumerate(shapes.items()):
            file = scratch / str(number)
            with file.open(
                "wb"
            ) as handle:  # a hole in a mapped file on a full disk would be a bus error
                os.posix_fallocate(handle.fileno(), 0, 4 * math.prod(shape))
            self._arrays[path] = np.memmap(file, np.float32, "r+", shape=shape)

    def write(self, path: tuple[str, ...], start: int, block: np.ndarray) -> None:
        """Rows [start, start + len(block)) of a parameter."""
        array = self._arrays[path]
        array[start : start + len(block)] = block
        self._sums[path] += _fingerprint(array[start : start + len(block)], start)

    def save(self, directory: Path, position: dict[str, Any]) -> None:
        """Writes `directory`/0; `position` says where the parameters come from. `scratch` may then be deleted.

        `directory` must be one that takes its name when all is written: the manifest is, after the checkpoint.
        """
        params = unflatten_dict(self._arrays)
        fingerprints = {leaf_name(path): total % 2**32 for path, total in self._sums.items()}
        handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry(
            (np.memmap, handler),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns without it
        )
        arrays = {"params": params}
        position = position_of(0, position, params, fingerprints, prefix=".params")
        with ocp.CheckpointManager(
            directory.resolve(),
            item_names=("state", "position"),
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                "position": ocp.JsonCheckpointHandler(),
            },
        ) as manager:
            try:
                manager.save(
                    0,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(arrays, save_args=save_arguments(arrays)),
                        position=ocp.args.JsonSave(position),
                    ),
                )
            except ValueError as error:  # of TensorStore
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise
        checkpoint_manifest.write(epath.Path(directory.resolve()) / "0")


def _fingerprint(rows: np.ndarray, first_row: int) -> int:
    """The contribution of these rows to the fingerprint of their array, a little at a time: each part is copied."""
    row_size = math.prod(rows.shape[1:])
    step = max(1, _FINGERPRINT_BYTES // (row_size * rows.itemsize))
    parts = range(0, len(rows), step)
    return sum(block_fingerprint(rows[i : i + step], (first_row + i) * row_size) for i in parts)
