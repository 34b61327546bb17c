"""The sequence-length curriculum: short sequences first, DeepSpeed's length at every step.

Rule: CurriculumScheduler of DeepSpeed (deepspeed/runtime/data_pipeline/curriculum_scheduler.py, `fixed_linear`), asked
with the number of the step being taken, as its engine and Megatron-DeepSpeed do. Li et al. 2021, arXiv 2108.06084.
"""

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.mixture import permute, source_key
from bloomjax.phases import PhasedMixture, Stretch
from bloomjax.schedules import BatchSchedule
from bloomjax.skips import KeptSamples, Skips

MODES = ("truncate", "phases")


class LengthStage(NamedTuple):
    """Consecutive steps of one length: from which step (1-based), sample and token on, and tokens a sample."""

    first_step: int
    first_sample: int
    first_token: int
    length: int


@dataclasses.dataclass(frozen=True)
class LengthCurriculum:
    """Tokens of a sample at each step, from `start` to `end` in steps of `step`, linear over `num_steps` steps.

    A batch is filled up to the next of at most `num_buckets` lengths with tokens of weight 0, so that there are at most
    so many programs for a batch size.

    Attributes:
      end: TrainData.sequence_length; evaluation is at this length.
      batch_schedule: the run's.
      mode: "truncate", DeepSpeed's: a sample is a window of `end` tokens of which only the first are seen. "phases": a
        sample is as long as the step says, cut from the text where the sample before it ended; each token is seen.
      num_buckets: lengths that batches have, at most.

    Raises BadInput for numbers below 1, a start that is not below the end, lengths that `step` does not divide
    (DeepSpeed would never reach such an end, and begin below such a start), and an unknown mode.
    """

    start: int
    end: int
    step: int
    num_steps: int
    batch_schedule: BatchSchedule
    mode: str = "truncate"
    num_buckets: int = 8
    stages: tuple[LengthStage, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("start", "end", "step", "num_steps", "num_buckets"):
            if getattr(self, name) < 1:
                raise BadInput(
                    f"LengthCurriculum.{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.mode not in MODES:
            raise BadInput(f"no LengthCurriculum.mode {self.mode!r}; there are: {', '.join(MODES)}")
        if self.start >= self.end:
            raise BadInput(f"LengthCurriculum: start={self.start} is not below end={self.end}")
        for name in ("start", "end"):
            if getattr(self, name) % self.step:
                raise BadInput(
                    f"LengthCurriculum: step={self.step} does not divide {name}={getattr(self, name)}"
                )
        object.__setattr__(self, "stages", self._build_stages())

    def length(self, step: int) -> int:
        """Tokens a sample of `step` (1-based) has, in DeepSpeed's order of operations in float64."""
        length = math.floor(step / self.num_steps * (self.end - self.start) + self.start)
        return min(length - length % self.step, self.end)

    def _build_stages(self) -> tuple[LengthStage, ...]:
        samples_after = self.batch_schedule.samples_after
        firsts = {
            1 + bisect_left(range(1, self.num_steps + 1), length, key=self.length)
            for length in range(self.start, self.end + 1, self.step)
        }
        stages: list[LengthStage] = []
        for step in sorted(firsts):
            sample, token = samples_after(step - 1), 0
            if stages:
                before = stages[-1]
                token = before.first_token + (sample - before.first_sample) * before.length
            stages.append(LengthStage(step, sample, token, self.length(step)))
        return tuple(stages)

    def tokens_after(self, num_samples: int) -> int:
        """Tokens seen in the first `num_samples` samples; in mode "phases" at most: the last of a block is shorter."""
        last = bisect_right(self.stages, num_samples, key=lambda s: s.first_sample) - 1
        stage = self.stages[last]
        return stage.first_token + (num_samples - stage.first_sample) * stage.length

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths of batches: evenly spaced, as the steps of a linear curriculum are, and multiples of `step`."""
        parts = range(1, self.num_buckets + 1)
        units = self.end // self.step
        found = {-(-units * part // self.num_buckets) * self.step for part in parts}
        return tuple(sorted(length for length in found if length >= self.start))

    def bucket(self, length: int) -> int:
        """The smallest length of batches that holds `length` tokens."""
        return self.buckets[bisect_left(self.buckets, length)]

    def check(self, schedule: BatchSchedule) -> None:
        """BadInput unless the run has the batch schedule that the tokens were counted with."""
        if schedule != self.batch_schedule:
            raise BadInput(
                f"LengthCurriculum.batch_schedule is {self.batch_schedule}, the run's is {schedule}; bind "
                "the same object"
            )

    def programs(
        self, num_steps: int, num_rows: Callable[[int], int]
    ) -> dict[tuple[int, int], int]:
        """Shapes (rows, tokens) of the batches of a run, in order, each with the step that needs it first.

        `num_rows` are those that a batch of so many samples runs as.
        """
        steps = {stage.first_step for stage in self.stages}
        steps |= {stage.first_step for stage in self.batch_schedule.stages()}
        found: dict[tuple[int, int], int] = {}
        for step in sorted(step for step in steps if step <= num_steps):
            rows = num_rows(self.batch_schedule.batch_size(step))
            found.setdefault((rows, self.bucket(self.length(step))), step)
        return found

    def lines(self, num_steps: int, num_rows: Callable[[int], int]) -> list[str]:
        """What is said of it before step 1."""
        programs = self.programs(num_steps, num_rows)
        each = [f"{rows}x{length} from step {step}" for (rows, length), step in programs.items()]
        more = [f"and {len(each) - 8} more"] * (len(each) > 8)
        shapes = ", ".join(each[:8] + more)
        stage = self.stages[-1]
        return [
            f"sequence length {self.length(1)} to {self.end} by {self.step} until step {stage.first_step}, "
            f"mode {self.mode}: {len(self.stages)} lengths in {len(programs)} programs ({shapes})"
        ]

    def identity(self) -> dict[str, Any]:
        """What decides about the samples and the steps of a run, for its checkpoints."""
        names = "start", "end", "step", "num_steps", "mode"
        schedule = self.batch_schedule
        batch = {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule) if f.init}
        return {name: getattr(self, name) for name in names} | {"batch_schedule": batch}

    def mixture(
        self,
        shares: Mapping[str, float],
        num_tokens: Mapping[str, int],
        *,
        seed: int,
        block_tokens: int,
    ) -> "CutMixture":
        """The order of samples in mode "phases"."""
        lengths = [(stage.first_sample, stage.length) for stage in self.stages]
        return CutMixture(shares, lengths, num_tokens, seed=seed, block_tokens=block_tokens)

    def kept(self, mixture: PhasedMixture, skips: Skips) -> KeptSamples:
        """The samples of a run, which know the tokens that are seen of them."""
        if isinstance(mixture, CutMixture):
            return KeptSamples(mixture, skips)
        return TruncatedSamples(mixture, skips, self)


class TruncatedSamples(KeptSamples):
    """KeptSamples of which only the first tokens are seen, as many as the curriculum has at their positions."""

    def __init__(self, mixture: PhasedMixture, skips: Skips, curriculum: LengthCurriculum):
        super().__init__(mixture, skips)
        self._curriculum = curriculum

    def tokens_after(self, num: int) -> int:
        return self._curriculum.tokens_after(num)

    def tokens_by_source(self, num: int) -> dict[str, int]:
        found = dict.fromkeys(self.names, 0)
        stages = [stage for stage in self._curriculum.stages if stage.first_sample <= num]
        ends = [stage.first_sample for stage in stages[1:]] + [num]
        before = dict.fromkeys(self.names, 0)
        for stage, end in zip(stages, ends, strict=True):
            after = self.counts(end)
            for name in found:
                found[name] += (after[name] - before[name]) * stage.length
            before = after
        return found


class CutMixture(PhasedMixture):
    """A mixture of one phase whose samples have lengths that change, cut one after the other from each source's blocks.

    A block of `block_tokens` (their order is that of PhasedMixture) is read from its beginning to its end, whatever the
    lengths are; its last sample has the tokens that are left. So no token is lost, and none is repeated.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        lengths: list[tuple[int, int]],
        num_tokens: Mapping[str, int],
        *,
        seed: int,
        block_tokens: int,
    ):
        """`lengths`: (first sample, tokens a sample), of increasing samples from 0 on, none above `block_tokens`."""
        whole = Stretch(0, dict(shares), block_tokens)
        super().__init__([whole], num_tokens, seed=seed, block_tokens=block_tokens)
        if max(length for _, length in lengths) > block_tokens:
            raise BadInput(
                f"samples of up to {lengths[-1][1]} tokens need blocks of as many, got {block_tokens}"
            )
        self.stretches = tuple(Stretch(first, whole.shares, length) for first, length in lengths)
        self.skipped_tokens = [0] * len(lengths)
        self._lengths = np.array([length for _, length in lengths], np.int64)
        self._first_samples = np.array([first for first, _ in lengths], np.int64)
        # By stage and source: how many samples it had before, and where in its endless row of blocks it stood.
        self._before = np.stack([self._counts(first) for first, _ in lengths])
        self._positions = np.zeros_like(self._before)
        for p in range(1, len(lengths)):
            num = self._before[p] - self._before[p - 1]
            self._positions[p] = self._position(self._positions[p - 1], num, lengths[p - 1][1])

    def _counts(self, num_samples: int) -> np.ndarray:
        return np.array(self._interleaves[0].counts(num_samples), np.int64)

    def _position(self, position, num, length):
        """Where a source stands `num` samples of a length later."""
        block, offset = np.divmod(position, self.block_tokens)
        begun = -(-(self.block_tokens - offset) // length)  # samples that end the begun block
        num_more, within = np.divmod(num - begun, -(-self.block_tokens // length))
        after = (block + 1 + num_more) * self.block_tokens + within * length
        return np.where(num < begun, position + num * length, after)

    def phase_of(self, samples: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._first_samples, samples, side="right") - 1

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number into `names`, epoch, first token of the sample in the source) of each sample; int64."""
        samples = np.asarray(samples, np.int64)
        source, occurrence = self._interleaves[0].locate(samples)
        p = self.phase_of(samples)
        num = occurrence - self._before[p, source]
        position = self._position(self._positions[p, source], num, self._lengths[p])
        block, offset = np.divmod(position, self.block_tokens)
        size = self._num_blocks[source]
        epoch, place = np.divmod(block, size)
        key = source_key(source, epoch, self.seed)
        return source, epoch, permute(place, size, key) * self.block_tokens + offset

    def sizes(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Tokens predicted in each sample, given the first token that `locate` says."""
        left = self.block_tokens - starts % self.block_tokens
        return np.minimum(self._lengths[self.phase_of(samples)], left)

    def tokens_by_source(self, num_samples: int) -> dict[str, int]:
        p = int(self.phase_of(num_samples))
        num = self._counts(num_samples) - self._before[p]
        found = self._position(self._positions[p], num, self._lengths[p])
        return dict(zip(self.names, found.tolist(), strict=True))

    def tokens_after(self, num_samples: int) -> int:
        return sum(self.tokens_by_source(num_samples).values())
