"""Faults on purpose, for tests and drills: `--gin.fault.crash_at_step=50`. None happens unless it is asked for."""

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

from bloomjax import checkpoint_manifest, job
from bloomjax.errors import BadInput
from bloomjax.journal import Journal

Samples = tuple[int, int]  # [first, end)


def fault(
    *,
    process: int | None = None,
    crash_at_step: int | None = None,
    crash_in_save_of_step: int | None = None,
    hang_at_step: int | None = None,
    nan_samples: Samples | None = None,
    noise_samples: Samples | None = None,
    flip_bit_at_step: int | None = None,
    flip_leaf: str = "['final_norm']['scale']",
    slow_host_seconds: float = 0.0,
    slow_host_from_step: int = 1,
    full_disk_at_step: int | None = None,
) -> "Fault | None":
    """None if nothing is asked for. Faults of a moment happen once in a MODEL_DIR, whatever restarts follow.

    Args:
      process: number of the one to which all but bad samples happens; None for the last.
      crash_at_step: kill -9 before this step is taken.
      crash_in_save_of_step: kill -9 while the checkpoint of this step is being written.
      hang_at_step: before this step the process stops working, but lives.
      nan_samples: numbers [first, end) of samples that turn the loss into NaN, whenever they are taken.
      noise_samples: numbers [first, end) of samples whose tokens are random, whenever they are taken: a loss spike.
      flip_bit_at_step: after this step one bit of one device's copy of a parameter or moment is another.
      flip_leaf: part of the path of that array, such as ".opt_state" or "['embedding']"; the first that has it.
      slow_host_seconds, slow_host_from_step: what each step takes longer in the process, from this step on.
      full_disk_at_step: the first save from this step on finds no space on the disk.

    Raises:
      BadInput: a step, range, process or number of seconds that cannot be.
    """
    moments = {
        "crash": crash_at_step, "crash_in_save": crash_in_save_of_step, "hang": hang_at_step,
        "flip_bit": flip_bit_at_step, "full_disk": full_disk_at_step,
    }  # fmt: skip
    moments = {kind: step for kind, step in moments.items() if step is not None}
    for kind, step in (*moments.items(), ("slow_host", slow_host_from_step)):
        if step < 1:
            raise BadInput(f"fault: the first step is 1, got {step} for {kind}")
    bad_samples = {"nan_samples": nan_samples, "noise_samples": noise_samples}
    bad_samples = {kind: where for kind, where in bad_samples.items() if where is not None}
    for kind, where in bad_samples.items():
        if len(where) != 2 or not 0 <= where[0] < where[1]:
            raise BadInput(f"fault.{kind} must be (first, end) with 0 <= first < end, got {where}")
    if not slow_host_seconds >= 0:
        raise BadInput(f"fault.slow_host_seconds must not be negative, got {slow_host_seconds}")
    if process is not None and process < 0:
        raise BadInput(f"fault.process must be the number of a process, from 0, got {process}")
    if not (moments or bad_samples or slow_host_seconds):
        return None
    return Fault(moments, bad_samples, process, flip_leaf, slow_host_seconds, slow_host_from_step)


@dataclasses.dataclass
class Fault:
    """What `fault` was asked for; `train` calls the methods at the places they are named for.

    Attributes:
      moments: step of each fault of a moment, by kind.
      bad_samples: range of each kind of bad sample.
      process, flip_leaf, slow_host_seconds, slow_host_from_step: as in `fault`.
    """

    moments: dict[str, int]
    bad_samples: dict[str, Samples]
    process: int | None
    flip_leaf: str
    slow_host_seconds: float
    slow_host_from_step: int

    def open(self, journal: Journal) -> None:
        """Looks up which faults have already happened, and notes those that last. Every process calls it."""
        num_processes = jax.process_count()
        if self.process is not None and self.process >= num_processes:
            raise BadInput(
                f"fault.process={self.process}, but this job has {num_processes} processes, numbered from 0"
            )
        process = num_processes - 1 if self.process is None else self.process
        self._is_here = jax.process_index() == process
        self._is_main = job.is_main()
        self._journal = journal
        self._happened = {(e.get("kind"), e.get("step")) for e in journal.events("fault")}
        for kind, where in self.bad_samples.items():
            if self._is_main and (kind, None) not in self._happened:
                journal.write("fault", kind=kind, samples=where)

    def before_step(self, step: int) -> None:
        """Before this step is taken: a crash, a hang, or a delay."""
        if self._happens("crash", step):
            _crash()
        if self._happens("hang", step):
            _hang()
        if self._is_here and self.slow_host_seconds and step >= self.slow_host_from_step:
            if not any(kind == "slow_host" for kind, _ in self._happened):
                self._note("slow_host", step, seconds=self.slow_host_seconds)
            time.sleep(self.slow_host_seconds)

    def in_save(self, step: int) -> None:
        """Right after Checkpoints.save has returned, while the files are being written."""
        if self._happens("crash_in_save", step):
            _crash()

    def on_batch(self, batch: dict[str, jax.Array], samples: np.ndarray) -> dict[str, jax.Array]:
        """The batch with its bad samples spoiled.

        Args:
          batch: tokens int32 [B, L + 1], weights float32 [B], sharded by rows.
          samples: numbers of the real rows: row i holds samples[i]. The others only fill the mesh.
        """
        samples = np.asarray(samples)

        def spoil(array: jax.Array, kind: str, spoiled: Callable[[int, Any], Any]) -> jax.Array:
            first, end = self.bad_samples.get(kind, (0, 0))
            bad = np.flatnonzero((first <= samples) & (samples < end))
            if not len(bad):
                return array

            def of_shard(shard):
                rows = range(*shard.index[0].indices(array.shape[0]))
                mine = [row for row in bad.tolist() if row in rows]
                if not mine:
                    return shard.data
                data = np.array(shard.data)
                for row in mine:
                    at = row - rows.start
                    data[at] = spoiled(int(samples[row]), data[at])
                return data

            return _with_shards(array, of_shard)

        return batch | {
            "tokens": spoil(batch["tokens"], "noise_samples", _noise),
            "weights": spoil(batch["weights"], "nan_samples", lambda sample, weight: np.nan),
        }

    def on_state(self, step: int, state: Any) -> Any:
        """The state after this step, with one bit flipped in one of the copies that the devices of the process hold."""
        if not self._happens("flip_bit", step, leaf=self.flip_leaf):
            return state
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        number = next((n for n, name in enumerate(names) if self.flip_leaf in name), None)
        if number is None:
            raise BadInput(
                f"fault.flip_leaf={self.flip_leaf!r} is in no path of the state; there are: {', '.join(names)}"
            )
        arrays = [array for _, array in leaves]
        last = arrays[number].addressable_shards[-1].device
        arrays[number] = _with_shards(
            arrays[number], lambda s: _flipped(s.data) if s.device == last else s.data
        )
        return jax.tree_util.tree_unflatten(tree, arrays)

    def full_disk(self, step: int) -> None:
        """Before Checkpoints.save: if it is time, what this process writes next finds no space on the disk."""
        at = self.moments.get("full_disk")
        if self._is_here and at is not None and step >= at:
            if ("full_disk", at) not in self._happened:
                self._note("full_disk", at, save_of_step=step)
                _fill_disk()

    def _happens(self, kind: str, step: int, **fields: Any) -> bool:
        """Whether it happens now and here; it is in the journal before it does."""
        if not self._is_here or self.moments.get(kind) != step or (kind, step) in self._happened:
            return False
        self._note(kind, step, **fields)
        return True

    def _note(self, kind: str, step: int, **fields: Any) -> None:
        self._happened.add((kind, step))
        self._journal.write_from_here("fault", kind=kind, step=step, **fields)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def _with_shards(array: jax.Array, of_shard: Callable[[Any], Any]) -> jax.Array:
    """The array with the data that `of_shard` returns for each shard of this process, where it was."""
    parts = [jax.device_put(of_shard(shard), shard.device) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def _noise(sample: int, tokens: np.ndarray) -> np.ndarray:
    """Random tokens, always the same for a sample; not above those that it had, so that each is in the vocabulary."""
    rng = np.random.default_rng(sample)
    return rng.integers(0, int(tokens.max()) + 1, tokens.shape, tokens.dtype)


def _flipped(data: jax.Array) -> np.ndarray:
    """With the highest but one bit of the mantissa flipped in one element: a quarter of 1.0, and never infinite."""
    found = np.array(data)
    itemsize = found.dtype.itemsize
    bit = {1: 1, 2: 5, 4: 21}[itemsize]  # of bfloat16 and float32
    bits = found.reshape(-1).view(f"u{itemsize}")
    bits[len(bits) // 2] ^= np.array(1 << bit, bits.dtype)
    return found


def _fill_disk() -> None:
    """Once: the error comes where a checkpoint is flushed behind the training, which is where real ones come late."""
    flush = checkpoint_manifest.entries_of

    def fail(folder, names, *, sync=False):
        if not sync:  # only reads
            return flush(folder, names)
        checkpoint_manifest.entries_of = flush
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))

    checkpoint_manifest.entries_of = fail
