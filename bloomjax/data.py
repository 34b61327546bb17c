"""Token store + mixture + batch schedule -> global arrays on the mesh, read ahead of time.

Dimension key: B rows of a batch (filled up to what the mesh divides), L sequence_length.
"""

import concurrent.futures
import importlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax.errors import BadInput
from bloomjax.mixture import MAX_SAMPLES, Mixture, temperature_weights
from bloomjax.partitioning import BATCH_AXES, num_batch_shards
from bloomjax.schedules import BatchSchedule
from bloomjax.token_store import TokenStore
from bloomjax.train_step import Batch


def filled_rows(num_rows: int, multiple: int) -> int:
    """`num_rows` rounded up to a multiple."""
    return -(-num_rows // multiple) * multiple


def check_filled_shares(
    schedule: BatchSchedule, num_steps: int, multiple: int, max_filled_share: float
) -> list[str]:
    """One line a stage that has to be filled.

    BadInput where more than `max_filled_share` of the rows would be empty, or the run outgrows the sample numbers.
    """
    if schedule.samples_after(num_steps) > MAX_SAMPLES:
        raise BadInput(
            f"{num_steps} steps take {schedule.samples_after(num_steps)} samples; sample numbers end at {MAX_SAMPLES}"
        )
    lines = []
    for stage in schedule.stages():
        if stage.first_step > num_steps:
            break
        size = stage.batch_size_samples
        rows = filled_rows(size, multiple)
        share = 1 - size / rows
        if share > max_filled_share:
            raise BadInput(
                f"a batch of {size} samples (from step {stage.first_step} on) fills only {1 - share:.0%} of the {rows} "
                f"rows that this mesh and microbatch need (multiples of {multiple}); use fewer data x fsdp shards or a "
                f"smaller microbatch, or allow it with "
                f"--gin.TrainData.max_filled_share={math.ceil(share * 100) / 100}"
            )
        if rows != size:
            lines.append(
                f"from step {stage.first_step}: batch {size} runs as {rows} rows, {share:.1%} of them with weight 0"
            )
    return lines


def put_batch(tokens: dict[int, np.ndarray], num_rows: int, length: int, mesh: Mesh) -> Batch:
    """Global arrays from this host's rows: `tokens` maps row number -> int32 [length]; missing rows weigh 0."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def token_rows(index):
        rows = np.zeros((len(range(*index[0].indices(num_rows))), length), np.int32)
        for i, row in enumerate(range(*index[0].indices(num_rows))):
            if row in tokens:
                rows[i] = tokens[row]
        return rows

    def weight_rows(index):
        rows = range(*index[0].indices(num_rows))
        return np.array([float(row in tokens) for row in rows], np.float32)

    return {
        "tokens": jax.make_array_from_callback((num_rows, length), sharding, token_rows),
        "weights": jax.make_array_from_callback((num_rows,), sharding, weight_rows),
    }


def host_rows(num_rows: int, mesh: Mesh) -> np.ndarray:
    """Numbers of the rows that devices of this process hold, sorted."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices]))


class TrainData:
    """What is trained on, in which shares and order. `open` comes later: a missing store can be prepared first."""

    def __init__(
        self,
        *,
        store_dir: str,
        sequence_length: int,
        seed: int,
        weights: dict[str, float] | str | None = None,
        temperature: float = 1.0,
        max_filled_share: float = 0.5,
        num_prefetched: int = 2,
    ):
        """
        Args:
          store_dir: token store that `prepare` wrote.
          sequence_length: tokens predicted in each row; windows of L + 1 overlap by one.
          seed: of the order of windows.
          weights: token share of each language: a dict; "module:NAME" of a table (TF-free, such as
            "bloomjax.tasks.languages:ROOTS_WEIGHTS"), of which the languages that the store has keep their proportions;
            or None for the share each has in the store.
          temperature: shares become w^(1/temperature).
          max_filled_share: refuse a batch of which more rows than this would be empty.
          num_prefetched: batches read ahead.
        """
        if sequence_length < 1 or num_prefetched < 1:
            raise BadInput(
                f"sequence_length and num_prefetched must be at least 1, got {sequence_length} and {num_prefetched}"
            )
        self.store_dir = store_dir
        self.sequence_length = sequence_length
        self.seed = seed
        self.max_filled_share = max_filled_share
        self._weights = weights
        self._temperature = temperature
        self._num_prefetched = num_prefetched

    def open(self) -> "OpenTrainData":
        """BadInput if the store is missing, broken, lacks a language of the weights, or has too little text."""
        store = TokenStore(self.store_dir)
        weights = self._weights
        if isinstance(weights, str):
            module, _, name = weights.partition(":")
            try:
                weights = getattr(importlib.import_module(module), name)
                if not isinstance(weights, dict):
                    raise ValueError(f"{name} is a {type(weights).__name__}")
            except (ImportError, AttributeError, ValueError) as error:
                raise BadInput(
                    f"weights={self._weights!r} is not 'module:NAME' of a dict: {error}"
                ) from error
            absent = sorted(set(weights) - set(store.languages))
            if absent:
                logging.warning("%s has no %s", self.store_dir, ", ".join(absent))
            weights = {name: w for name, w in weights.items() if name in store.languages}
            if not weights:
                raise BadInput(
                    f"the store {self.store_dir} has no language of {self._weights}; "
                    f"it has {', '.join(store.languages)}"
                )
        if weights is None:
            weights = {name: store.num_tokens(name, "train") for name in store.languages}
        missing = sorted(set(weights) - set(store.languages))
        if missing:
            raise BadInput(
                f"the mixture names {', '.join(missing)}, which the store {self.store_dir} does not have; "
                f"it has {', '.join(store.languages)}"
            )
        weights = temperature_weights(weights, self._temperature)
        length = self.sequence_length
        num_windows = {name: store.num_windows(name, "train", length) for name in weights}
        mixture = Mixture(weights, num_windows, self.seed)
        return OpenTrainData(store, mixture, length, self._num_prefetched)


class OpenTrainData:
    """Rows by sample number, and batches by step."""

    def __init__(
        self, store: TokenStore, mixture: Mixture, sequence_length: int, num_prefetched: int
    ):
        self.store = store
        self.mixture = mixture
        self.sequence_length = sequence_length
        self._num_prefetched = num_prefetched

    def identity(self) -> dict[str, Any]:
        """What decides which tokens sample k is; saved with each checkpoint and compared on resume."""
        return {
            "store": self.store.fingerprint,
            "vocabulary": self.store.vocabulary_fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.mixture.seed,
            "shares": self.mixture.shares,
        }

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of these samples, int32 [len(samples), L + 1]."""
        source, _, window = self.mixture.locate(samples)
        rows = np.zeros((len(samples), self.sequence_length + 1), np.int32)
        for number in np.unique(source):
            at = source == number
            rows[at] = self.store.read_windows(
                self.mixture.names[number], "train", window[at], self.sequence_length
            )
        return rows

    def batch(self, step: int, schedule: BatchSchedule, mesh: Mesh, multiple: int) -> Batch:
        """The batch of `step` (1-based), filled with rows of weight 0 to a multiple of `multiple`."""
        first, size = schedule.samples_after(step - 1), schedule.batch_size(step)
        num_rows = filled_rows(size, multiple)
        mine = host_rows(num_rows, mesh)
        mine = mine[mine < size]
        tokens = dict(zip(mine.tolist(), self.rows(first + mine), strict=True))
        return put_batch(tokens, num_rows, self.sequence_length + 1, mesh)

    def batches(
        self, first_step: int, last_step: int, schedule: BatchSchedule, mesh: Mesh, multiple: int
    ) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from first_step to last_step, read ahead on a thread."""
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as pool:
            ahead: list[concurrent.futures.Future] = []
            for step in range(first_step, last_step + 1):
                while len(ahead) < self._num_prefetched and step + len(ahead) <= last_step:
                    ahead.append(
                        pool.submit(self.batch, step + len(ahead), schedule, mesh, multiple)
                    )
                yield step, ahead.pop(0).result()


class EvalData:
    """Held-out windows: the first `max_windows_per_language` of each language's validation split."""

    def __init__(self, *, max_windows_per_language: int = 8, batch_size_samples: int = 32):
        if max_windows_per_language < 1 or batch_size_samples < 1:
            raise BadInput(
                f"max_windows_per_language and batch_size_samples must be at least 1, got "
                f"{max_windows_per_language} and {batch_size_samples}"
            )
        self.max_windows_per_language = max_windows_per_language
        self.batch_size_samples = batch_size_samples

    def batches(self, data: OpenTrainData, mesh: Mesh) -> Iterator[tuple[list[str], Batch]]:
        """(language of each real row, batch). BadInput names languages without a held-out window."""
        length, store = data.sequence_length, data.store
        windows: list[tuple[str, int]] = []
        for name in data.mixture.names:
            num = min(store.num_windows(name, "validation", length), self.max_windows_per_language)
            windows += [(name, w) for w in range(num)]
        without = sorted(set(data.mixture.names) - {name for name, _ in windows})
        if without:
            raise BadInput(
                f"no held-out window of {length} tokens in: {', '.join(without)} "
                f"(store {store.path}); give more text, hold out more, or shorten the sequence"
            )
        num_rows = filled_rows(self.batch_size_samples, num_batch_shards(mesh))
        mine = host_rows(num_rows, mesh)
        for first in range(0, len(windows), num_rows):
            part = windows[first : first + num_rows]
            tokens = {
                int(row): store.read_windows(part[row][0], "validation", np.array([part[row][1]]), length)[0]
                for row in mine
                if row < len(part)
            }  # fmt: skip
            yield [name for name, _ in part], put_batch(tokens, num_rows, length + 1, mesh)
