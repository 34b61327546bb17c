"""The parameters of a checkpoint piece by piece, for export and import, which never hold a model in memory."""

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

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
        array = self._open(path)
        num_rows = array.shape[0]
        chunk = array.chunk_layout.read_chunk.shape
        step = num_rows
        if chunk and chunk[0]:
            step = chunk[0]
        return ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))

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
        """Writes `directory`/0; `position` says where the parameters come from. `scratch` may then be deleted."""
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


def _fingerprint(rows: np.ndarray, first_row: int) -> int:
    """The contribution of these rows to the fingerprint of their array, a little at a time: each part is copied."""
    row_size = math.prod(rows.shape[1:])
    step = max(1, _FINGERPRINT_BYTES // (row_size * rows.itemsize))
    parts = range(0, len(rows), step)
    return sum(block_fingerprint(rows[i : i + step], (first_row + i) * row_size) for i in parts)
