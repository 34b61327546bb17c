"""Token store + mixture + batch schedule -> global arrays on the mesh, read ahead of time.

Dimension key: B rows of a batch (filled up to what the mesh divides), L sequence_length.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax.curriculum import CutMixture, LengthCurriculum
from bloomjax.errors import BadInput
from bloomjax.mixture import MAX_SAMPLES
from bloomjax.mixture_weights import find_table, temperature_weights
from bloomjax.objectives import CausalLM, Key, Objective, filling, identity
from bloomjax.partitioning import BATCH_AXES, num_batch_shards
from bloomjax.phases import PhasedMixture, Stretch, phases_identity
from bloomjax.schedules import BatchSchedule
from bloomjax.skips import KeptSamples, Skips
from bloomjax.token_store import TokenStore
from bloomjax.train_step import Batch


def filled_rows(num_rows: int, multiple: int) -> int:
    """`num_rows` rounded up to a multiple."""
    return -(-num_rows // multiple) * multiple


def check_filled_shares(
    schedule: BatchSchedule, num_steps: int, num_rows: Callable[[int], int], max_filled_share: float
) -> list[str]:
    """One line a stage that has to be filled; `num_rows` are those that a batch of so many samples runs as.

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
        rows = num_rows(size)
        share = 1 - size / rows
        if share > max_filled_share:
            raise BadInput(
                f"a batch of {size} samples (from step {stage.first_step} on) fills only {1 - share:.0%} of the {rows} "
                f"rows that this mesh and microbatch need; use fewer data x fsdp shards or another microbatch, or "
                f"allow it with "
                f"--gin.TrainData.max_filled_share={math.ceil(share * 100) / 100}"
            )
        if rows != size:
            lines.append(
                f"from step {stage.first_step}: batch {size} runs as {rows} rows, {share:.1%} of them with weight 0"
            )
    return lines


def put_batch(
    tokens: Mapping[int, np.ndarray],
    num_rows: int,
    length: int,
    mesh: Mesh,
    objective: Objective = CausalLM(),  # noqa: B008 # immutable
    keys: Mapping[int, Key] | None = None,
    is_padded: bool = False,
) -> Batch:
    """Global arrays from this host's rows: `tokens` maps row number -> int32 [length]; missing rows weigh 0.

    `keys` has the key of each of these rows for the objective; CausalLM needs none. If `is_padded` rows may be shorter,
    and the tokens that fill them up weigh 0 (`token_weights`).
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    filled = filling(objective, length - 1)
    made = {row: objective.row(tokens[row], keys[row] if keys else ()) for row in tokens}
    if is_padded:
        filled = _padded(np.zeros(1, np.int32), length)
        made = {row: _padded(tokens[row], length) for row in tokens}

    def rows_of(name, index):
        return np.stack([made.get(r, filled)[name] for r in range(*index[0].indices(num_rows))])

    def weight_rows(index):
        rows = range(*index[0].indices(num_rows))
        return np.array([float(row in tokens) for row in rows], np.float32)

    batch = {
        name: jax.make_array_from_callback(
            (num_rows, *array.shape), sharding, functools.partial(rows_of, name)
        )
        for name, array in filled.items()
    }
    return batch | {"weights": jax.make_array_from_callback((num_rows,), sharding, weight_rows)}


def _padded(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """A row of `length` tokens, of which those are predicted that are there."""
    is_there = np.arange(length - 1) < len(tokens) - 1
    return {
        "tokens": np.pad(tokens, (0, length - len(tokens))),
        "token_weights": is_there.astype(np.float32),
    }


def sample_keys(samples: np.ndarray, rows: Iterable[int]) -> dict[int, Key]:
    """For an objective, of the rows of a batch whose row i is samples[i]."""
    return {row: (0, int(samples[row])) for row in rows}


def held_out_key(language: str, window: int) -> Key:
    """For an objective, of a window that is not trained on."""
    return (1, zlib.crc32(language.encode()), window)


def host_rows(num_rows: int, mesh: Mesh) -> np.ndarray:
    """Numbers of the rows that devices of this process hold, sorted."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices]))


Weights = Mapping[str, float] | Callable[[Mapping[str, int]], Mapping[str, float]] | str


@dataclasses.dataclass(frozen=True)
class Phase:
    """What changes at a sample of a run; each source goes on where it was.

    Attributes:
      first_sample: the first one that it decides.
      weights, temperature: as TrainData's; None keeps the shares, or takes those of a new store.
      sequence_length: tokens predicted in each row; None keeps it. It begins with a step.
      store_dir: None keeps the store. The languages of another store are sources of their own.
    """

    first_sample: int
    weights: Weights | None = None
    temperature: float = 1.0
    sequence_length: int | None = None
    store_dir: str | None = None


class TrainData:
    """What is trained on, in which shares and order. `open` comes later: a missing store can be prepared first."""

    def __init__(
        self,
        *,
        store_dir: str,
        sequence_length: int,
        seed: int,
        weights: Weights | None = None,
        temperature: float = 1.0,
        phases: Sequence[Phase] = (),
        skip_samples: Sequence[tuple[int, int]] = (),
        block_tokens: int | None = None,
        curriculum: LengthCurriculum | None = None,
        max_filled_share: float = 0.5,
        num_prefetched: int = 2,
        objective: Objective | None = None,
    ):
        """
        Args:
          store_dir: token store that `prepare` wrote.
          sequence_length: tokens predicted in each row; windows of L + 1 overlap by one.
          seed: of the order of windows.
          weights: token share of each language: a dict; "module:NAME" of a table (TF-free, such as
            "bloomjax.tasks.languages:ROOTS_WEIGHTS"), of which the languages that the store has keep their proportions;
            a function of {language: tokens in the store}; or None for the share each has in the store.
          temperature: shares become w^(1/temperature).
          phases: what changes later; a run may be given more of them than it began with, for samples it has not seen.
          skip_samples: ranges (first, end) of sample numbers that are not trained on; later samples move up. A run may
            be given more of them than it began with, for samples it has not seen.
          block_tokens: what is shuffled; a multiple of every sequence_length, None for sequence_length.
          curriculum: shorter sequences in the first steps, up to sequence_length.
          max_filled_share: refuse a batch of which more rows than this would be empty.
          num_prefetched: batches read ahead.
          objective: what is predicted from what (see objectives.py); None for CausalLM.
        """
        if sequence_length < 1 or num_prefetched < 1:
            raise BadInput(
                f"sequence_length and num_prefetched must be at least 1, got {sequence_length} and {num_prefetched}"
            )
        self.store_dir = store_dir
        self.sequence_length = sequence_length
        self.seed = seed
        self.max_filled_share = max_filled_share
        self._phases = (Phase(0, weights, temperature), *phases)
        self._skips = Skips.of(skip_samples)
        self._block_tokens = block_tokens or sequence_length
        self._curriculum = curriculum
        self._num_prefetched = num_prefetched
        self.objective = objective or CausalLM()
        self._check_curriculum()

    def _check_curriculum(self) -> None:
        curriculum = self._curriculum
        if curriculum is None:
            return
        if curriculum.end != self.sequence_length:
            raise BadInput(
                f"LengthCurriculum.end={curriculum.end} must be TrainData.sequence_length={self.sequence_length}"
            )
        if any(phase.sequence_length for phase in self._phases):
            raise BadInput("a curriculum and a phase with a sequence_length exclude each other")
        if curriculum.mode == "phases" and self._block_tokens % curriculum.end:
            raise BadInput(
                f"TrainData.block_tokens={self._block_tokens} is no multiple of LengthCurriculum.end={curriculum.end}"
            )
        if curriculum.mode == "phases" and len(self._phases) > 1:
            raise BadInput("TrainData.phases need LengthCurriculum.mode='truncate'")
        if not isinstance(self.objective, CausalLM):
            name = type(self.objective).__name__
            raise BadInput(f"a curriculum is for CausalLM, not for TrainData.objective={name}")

    @property
    def sequence_lengths(self) -> set[int]:
        """Of all batches."""
        if self._curriculum:
            return {self.sequence_length, *self._curriculum.buckets}
        return {self.sequence_length} | {
            p.sequence_length for p in self._phases if p.sequence_length
        }

    def open(self) -> "OpenTrainData":
        """BadInput if a store is missing, broken, lacks a language of the weights, or has too little text."""
        stores: dict[str, TokenStore] = {}
        sources: dict[str, tuple[TokenStore, str]] = {}
        stretches: list[Stretch] = []
        store_dir, length, shares = self.store_dir, self.sequence_length, {}
        for phase in self._phases:
            if stretches and phase.temperature != 1.0 and not (phase.weights or phase.store_dir):
                raise BadInput(
                    f"the phase from sample {phase.first_sample} has a temperature but neither weights nor a store_dir"
                )
            if phase.weights is not None or phase.store_dir is not None or not stretches:
                store_dir = phase.store_dir or store_dir
                store = stores.setdefault(store_dir, TokenStore(store_dir))
                labels = {name: _label(name, store, sources) for name in store.languages}
                weights = _weights_in(store, phase.weights)
                weights = temperature_weights(weights, phase.temperature)
                total = sum(weights.values())
                shares = {labels[name]: w / total for name, w in weights.items()}
                sources |= {labels[name]: (store, name) for name in weights}
            length = phase.sequence_length or length
            stretches.append(Stretch(phase.first_sample, shares, length))
        first, *others = stores.values()
        for store in others:
            if store.vocabulary_fingerprint != first.vocabulary_fingerprint:
                raise BadInput(f"{store.path} was made with another vocabulary than {first.path}")
        _check_kind(self.objective, sources.values(), self.sequence_lengths)
        num_tokens = {
            name: store.num_tokens(lang, "train") for name, (store, lang) in sources.items()
        }
        order: Any = {"seed": self.seed, "block_tokens": self._block_tokens}
        curriculum = self._curriculum
        if curriculum and curriculum.mode == "phases":
            mixture = curriculum.mixture(shares, num_tokens, **order)
        else:
            mixture = PhasedMixture(stretches, num_tokens, **order)
        return OpenTrainData(
            first, sources, mixture, self._num_prefetched, self._skips, self.objective, curriculum
        )


def _check_kind(
    objective: Objective, sources: Iterable[tuple[TokenStore, str]], lengths: Iterable[int]
) -> None:
    """BadInput where an objective for text meets examples, or the other way round, or windows cut them."""
    for store, language in sources:
        name, packed = type(objective).__name__, store.pack_tokens(language)
        if objective.takes_examples != (packed is not None):
            kind, objectives = ("text", "other objectives") if packed is None else (
                "inputs and targets", "TrainData.objective = @InputsTargets()")  # fmt: skip
            raise BadInput(f"{store.path} holds {kind}, not for {name}; that takes {objectives}")
        if packed and (bad := [length for length in lengths if length % packed]):
            raise BadInput(
                f"{store.path} was packed for windows of {packed} tokens (prepare.pack_tokens), and SEQUENCE_LENGTH is "
                f"{bad[0]}: no multiple of it"
            )


def _label(language: str, store: TokenStore, sources: dict[str, tuple[TokenStore, str]]) -> str:
    """The language, and the name of the store's folder where an earlier store has that language, too."""
    there = sources.get(language)
    if there is None or there[0] is store:
        return language
    names = (
        f"{language}@{Path(store.path).name}{x}" for x in ("", *(f".{n}" for n in range(2, 99)))
    )
    return next(name for name in names if name not in sources or sources[name][0] is store)


def _weights_in(store: TokenStore, weights: Weights | None) -> dict[str, float]:
    """The weights as a dict over languages of the store."""
    if weights is None:
        return {name: store.num_tokens(name, "train") for name in store.languages}
    if isinstance(weights, str):
        weights = _named_weights(store, weights)
    if callable(weights):
        weights = weights({name: store.num_tokens(name, "train") for name in store.languages})
    missing = sorted(set(weights) - set(store.languages))
    if missing:
        raise BadInput(
            f"the mixture names {', '.join(missing)}, which the store {store.path} does not have; "
            f"it has {', '.join(store.languages)}"
        )
    return dict(weights)


def _named_weights(store: TokenStore, where: str) -> dict[str, float]:
    """Those of a table "module:NAME" that the store has."""
    table = find_table(where)
    absent = sorted(set(table) - set(store.languages))
    if absent:
        logging.warning("%s has no %s", store.path, ", ".join(absent))
    found = {language: w for language, w in table.items() if language in store.languages}
    if not found:
        raise BadInput(
            f"the store {store.path} has no language of {where}; it has {', '.join(store.languages)}"
        )
    return found


_LOCATED_SAMPLES = 1 << 14  # divides MAX_SAMPLES


def _locate_block(mixture: PhasedMixture, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, window) of the samples [block, block + 1) * _LOCATED_SAMPLES."""
    first = block * _LOCATED_SAMPLES
    source, _, window = mixture.locate(np.arange(first, first + _LOCATED_SAMPLES))
    return source, window


class OpenTrainData:
    """Rows by sample number, and batches by step.

    Attributes:
      mixture: what each sample is, by its number.
      kept: the samples that are trained on, by position; `skip` changes it.
      store: of the first phase.
      sources: store and language of each source of the mixture.
      sequence_length: of the first phase, and of evaluation.
      objective: of training and of evaluation.
      curriculum: decides how much of a sample is seen; None for all.
    """

    def __init__(
        self,
        store: TokenStore,
        sources: Mapping[str, tuple[TokenStore, str]],
        mixture: PhasedMixture,
        num_prefetched: int,
        skips: Skips = Skips(),  # noqa: B008 # immutable
        objective: Objective = CausalLM(),  # noqa: B008 # immutable
        curriculum: LengthCurriculum | None = None,
    ):
        self.store = store
        self.objective = objective
        self.sources = sources
        self.mixture = mixture
        self.curriculum = curriculum
        self.skip(skips)
        first_length = mixture.stretches[0].sequence_length
        self.sequence_length = curriculum.end if curriculum else first_length
        self._num_prefetched = num_prefetched
        self._locate_block = functools.lru_cache(2)(functools.partial(_locate_block, mixture))

    def identity(self, num_samples: int = 0) -> dict[str, Any]:
        """What decides which tokens the samples are of which a run has trained on the first `num_samples`.

        Saved with each checkpoint and compared on resume. Phases that have not begun may still be changed.
        """
        found = {
            "store": self.store.fingerprint,
            "vocabulary": self.store.vocabulary_fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.mixture.seed,
            "shares": self.mixture.shares,
        } | identity(self.objective)
        if self.mixture.block_tokens != self.sequence_length:
            found["block_tokens"] = self.mixture.block_tokens
        if self.curriculum:
            found["curriculum"] = self.curriculum.identity()
        if isinstance(self.mixture, CutMixture):
            return found
        phases = phases_identity(self.mixture, self.kept.end(num_samples))
        for phase in phases:
            stores = {self.sources[name][0].fingerprint for name in phase["shares"]}
            phase["stores"] = sorted(stores - {self.store.fingerprint})
        return found | ({"phases": phases} if phases else {})

    def check_phases(
        self, schedule: BatchSchedule, num_steps: int, num_rows: Callable[[int], int] = int
    ) -> list[str]:
        """One line a phase, and one of a curriculum, whose batches run as `num_rows` of their size. BadInput where a
        length changes in the middle of a step."""
        lines = []
        if self.curriculum:
            self.curriculum.check(schedule)
            lines = self.curriculum.lines(num_steps, num_rows)
        if isinstance(self.mixture, CutMixture):
            return lines
        stretches = self.kept.stretches
        for p, (before, phase) in enumerate(itertools.pairwise(stretches), 1):
            first = phase.first_sample
            step = bisect.bisect_left(range(num_steps + 1), first, key=schedule.samples_after)
            if step <= num_steps and before.sequence_length != phase.sequence_length:
                if schedule.samples_after(step) != first:
                    raise BadInput(
                        f"the phase from sample {first} changes the sequence length in the middle of step {step}; "
                        f"begin it at sample {schedule.samples_after(step - 1)} or {schedule.samples_after(step)}"
                    )
            skipped = self.mixture.skipped_tokens[p]
            in_step = step + 1 if schedule.samples_after(step) == first else step
            lines.append(
                f"from sample {first} (step {in_step}): {len(phase.shares)} sources, {phase.sequence_length} tokens a "
                f"sample"
                + (f"; {skipped} tokens of begun blocks are too few for one" if skipped else "")
            )
        return lines

    def skip(self, skips: Skips) -> None:
        """Deletes these samples, and no others, from what `batches` will give."""
        make = self.curriculum.kept if self.curriculum else KeptSamples
        self.kept = make(self.mixture, skips)

    def without(self, first: int, num: int, schedule: BatchSchedule) -> Skips:
        """What is skipped when the samples at the positions [first, first + num) are deleted, too.

        A later phase of another length must go on beginning with a step, so the samples of the step in which it would
        begin now are deleted as well.
        """
        skips = self.kept.skips
        skips = Skips.of([*skips.ranges, *((s, s + n) for s, n in skips.runs(first, num))])
        for before, phase in itertools.pairwise(self.mixture.stretches):
            begins = skips.position_of(phase.first_sample)
            if before.sequence_length == phase.sequence_length or begins <= first:
                continue
            whole = schedule.samples_after(schedule.steps_within(begins))
            tail = skips.runs(whole, begins - whole)
            skips = Skips.of([*skips.ranges, *((s, s + n) for s, n in tail)])
        return skips

    def sequence_length_of(self, sample: int) -> int:
        """Tokens predicted in this sample."""
        return self.mixture.stretches[int(self.mixture.phase_of(sample))].sequence_length

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of these samples, which have one length L, int32 [len(samples), L + 1]."""
        if isinstance(self.mixture, CutMixture):
            raise BadInput("the samples of a LengthCurriculum with mode='phases' differ in length")
        length = self.sequence_length_of(int(samples[0])) if len(samples) else self.sequence_length
        return self._read(*self._locate(np.asarray(samples)), length)

    def rows_of_step(self, step: int, samples: np.ndarray) -> list[np.ndarray]:
        """What `step` sees of these samples of it: of each int32 [its length + 1]."""
        if isinstance(self.mixture, CutMixture):
            return self.cut_rows(samples)
        rows = self.rows(samples)
        return list(rows[:, : self.curriculum.length(step) + 1] if self.curriculum else rows)

    def cut_rows(self, samples: np.ndarray) -> list[np.ndarray]:
        """Tokens of these samples, each int32 [its length + 1]."""
        if not isinstance(self.mixture, CutMixture):
            return list(self.rows(samples))
        source, start = self._locate(np.asarray(samples))
        length = self.sequence_length
        window, offset = np.divmod(start, length)
        end = offset + self.mixture.sizes(samples, start)
        rows = list(self._read(source, window, length))
        more = np.flatnonzero(
            end > length
        )  # those that reach into the next window, of the same block
        following = self._read(source[more], window[more] + 1, length)
        for row, tokens in zip(more.tolist(), following, strict=True):
            rows[row] = np.concatenate([rows[row], tokens[1:]])
        return [
            row[a : b + 1] for row, a, b in zip(rows, offset.tolist(), end.tolist(), strict=True)
        ]

    def _read(self, source: np.ndarray, window: np.ndarray, length: int) -> np.ndarray:
        """These windows of `length` tokens, int32 [len(window), length + 1]."""
        rows = np.empty((len(window), length + 1), np.int32)
        order = np.argsort(source, kind="stable")
        numbers, firsts = np.unique(source[order], return_index=True)
        cuts = [*firsts.tolist(), len(order)]
        for number, (first, end) in zip(numbers.tolist(), itertools.pairwise(cuts), strict=True):
            store, language = self.sources[self.mixture.names[number]]
            at = order[first:end]
            store.read_windows_into(rows, at, language, "train", window[at])
        return rows

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, window) of each sample; those near each other come from one call, which costs little more."""
        blocks = samples // _LOCATED_SAMPLES
        block = int(blocks[0]) if len(blocks) else -1
        if not 0 <= block < MAX_SAMPLES // _LOCATED_SAMPLES or (blocks != block).any():
            source, _, window = self.mixture.locate(samples)
            return source, window
        source, window = self._locate_block(block)
        within = samples % _LOCATED_SAMPLES
        return source[within], window[within]

    def batch(
        self, step: int, schedule: BatchSchedule, mesh: Mesh, num_rows: Callable[[int], int]
    ) -> Batch:
        """The batch of `step` (1-based), filled with rows of weight 0 to `num_rows` of its size."""
        samples = self.samples_of(step, schedule)
        return self.batch_of(step, samples, mesh, num_rows(len(samples)))

    def batch_of(self, step: int, samples: np.ndarray, mesh: Mesh, num_rows: int) -> Batch:
        """Row i holds samples[i], which is one of `step`, and has weight 0 where that is below 0 or missing."""
        mine = host_rows(num_rows, mesh)
        mine = mine[mine < len(samples)]
        mine = mine[samples[mine] >= 0]
        tokens = dict(zip(mine.tolist(), self.rows_of_step(step, samples[mine]), strict=True))
        length = self.sequence_length_of(int(samples[samples >= 0][0]))
        if self.curriculum is None:
            keys = sample_keys(samples, tokens)
            return put_batch(tokens, num_rows, length + 1, mesh, self.objective, keys)
        if not isinstance(self.mixture, CutMixture):
            length = self.curriculum.length(step)
        bucket = self.curriculum.bucket(length)
        return put_batch(tokens, num_rows, bucket + 1, mesh, is_padded=True)

    def first_step_like(self, step: int, schedule: BatchSchedule) -> int:
        """The first step of the phase that `step` (1-based) belongs to; one more step of a curriculum is no phase."""
        if isinstance(self.mixture, CutMixture):
            return 1
        before = schedule.samples_after(step - 1)
        stretches = self.kept.stretches
        first = max(s.first_sample for s in stretches if s.first_sample <= before)
        return schedule.steps_within(first) + 1

    def samples_of(self, step: int, schedule: BatchSchedule) -> np.ndarray:
        """Numbers of the samples that `step` (1-based) takes, int64."""
        return self.kept.samples(schedule.samples_after(step - 1), schedule.batch_size(step))

    def batches(
        self,
        first_step: int,
        last_step: int,
        schedule: BatchSchedule,
        mesh: Mesh,
        num_rows: Callable[[int], int],
    ) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) from first_step to last_step, read ahead on a thread; `num_rows` as in `batch`."""
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as pool:
            ahead: list[concurrent.futures.Future] = []
            for step in range(first_step, last_step + 1):
                while len(ahead) < self._num_prefetched and step + len(ahead) <= last_step:
                    ahead.append(
                        pool.submit(self.batch, step + len(ahead), schedule, mesh, num_rows)
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
        length = data.sequence_length
        windows: list[tuple[str, int]] = []
        for name in data.mixture.names:
            store, language = data.sources[name]
            num = store.num_windows(language, "validation", length)
            windows += [(name, w) for w in range(min(num, self.max_windows_per_language))]
        without = sorted(set(data.mixture.names) - {name for name, _ in windows})
        if without:
            raise BadInput(
                f"no held-out window of {length} tokens in: {', '.join(without)} "
                f"(store {data.store.path}); give more text, hold out more, or shorten the sequence"
            )
        num_rows = filled_rows(self.batch_size_samples, num_batch_shards(mesh))
        mine = host_rows(num_rows, mesh)
        for first in range(0, len(windows), num_rows):
            part = windows[first : first + num_rows]
            tokens, keys = {}, {}
            for row in mine[mine < len(part)].tolist():
                (store, language), window = data.sources[part[row][0]], part[row][1]
                tokens[row] = store.read_windows(
                    language, "validation", np.array([window]), length
                )[0]
                keys[row] = held_out_key(language, window)
            names = [name for name, _ in part]
            yield names, put_batch(tokens, num_rows, length + 1, mesh, data.objective, keys)
