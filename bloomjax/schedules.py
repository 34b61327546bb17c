"""Schedules counted in samples: batch size, learning rate, and the one step <-> samples lookup.

A step is the number of finished steps, 1-based for the step being taken (Megatron's
`iteration`): step s uses samples [samples_after(s - 1), samples_after(s)).
"""

import dataclasses
import math
import operator
from bisect import bisect_right
from typing import Any

from bloomjax.errors import BadInput


def _whole(name: str, value: Any, minimum: int) -> int:
    """`value` as a Python int (numpy's would overflow at 2**31 samples), or BadInput."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise BadInput(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return number


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive steps of one batch size.

    first_step: 1-based. first_sample: samples consumed before it. num_steps: None in the last
    stage, which has no end.
    """

    first_step: int
    first_sample: int
    batch_size_samples: int
    num_steps: int | None


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Samples of each step: a constant batch, or Megatron's ramp up to it.

    With n = (batch_size_samples - ramp_start_samples) / ramp_increment_samples increments, a step
    that starts after `consumed` samples takes
    `ramp_start + int(consumed / (ramp_length / n)) * ramp_increment` samples while
    consumed <= ramp_length, and batch_size_samples after that. The divisions are in float64 as in
    Megatron-DeepSpeed (megatron/microbatches.py, --rampup-batch-size), so that the boundaries fall
    on the same sample. A ramp whose start equals the final size is a constant batch.

    Raises BadInput for numbers below 1, a ramp given in part, a start above the final size, and an
    increment that does not divide the range.
    """

    batch_size_samples: int
    ramp_start_samples: int | None = None
    ramp_increment_samples: int | None = None
    ramp_length_samples: int | None = None
    _stages: tuple[Stage, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        ramp = [name for name in given if name.startswith("ramp_")]
        missing = [name for name in ramp if given[name] is None]
        if missing and len(missing) < len(ramp):
            raise BadInput(
                f"BatchSchedule: a ramp needs {', '.join(ramp)}; missing: {', '.join(missing)}"
            )
        for name, value in given.items():
            if value is not None or name not in ramp:
                # The dataclass is frozen; this only turns numpy integers into Python's.
                object.__setattr__(self, name, _whole(f"BatchSchedule: {name}", value, 1))
        object.__setattr__(self, "_stages", self._build_stages())

    def _build_stages(self) -> tuple[Stage, ...]:
        """Walks the increments (never the steps) and notes where the batch size changes."""
        final = self.batch_size_samples
        start = self.ramp_start_samples
        increment = self.ramp_increment_samples
        length = self.ramp_length_samples
        if start is None or increment is None or length is None:
            return (Stage(1, 0, final, None),)
        if start > final:
            raise BadInput(
                f"BatchSchedule: ramp_start_samples={start} is above batch_size_samples={final}"
            )
        if (final - start) % increment:
            raise BadInput(
                f"BatchSchedule: ramp_increment_samples={increment} does not divide the range "
                f"batch_size_samples - ramp_start_samples = {final} - {start} = {final - start}"
            )
        num_increments = (final - start) // increment
        if num_increments == 0:
            return (Stage(1, 0, final, None),)
        samples_per_increment = length / num_increments

        def first_sample_of(increments: int) -> int:
            """Smallest c with int(c / samples_per_increment) >= increments, in float64."""
            sample = math.ceil(increments * samples_per_increment)
            # The product and the quotient round differently: step to where the quotient turns.
            while (sample - 1) / samples_per_increment >= increments:
                sample -= 1
            while sample / samples_per_increment < increments:
                sample += 1
            return sample

        stages = []
        step, sample = 1, 0
        while True:
            increments = num_increments
            if sample <= length:
                increments = int(sample / samples_per_increment)
            size = start + increments * increment
            if increments == num_increments:
                stages.append(Stage(step, sample, size, None))
                return tuple(stages)
            end = min(first_sample_of(increments + 1), length + 1)
            num_steps = -(-(end - sample) // size)
            stages.append(Stage(step, sample, size, num_steps))
            step += num_steps
            sample += num_steps * size

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order; the last one has no end."""
        return self._stages

    def _stage_of(self, step: int) -> Stage:
        return self._stages[bisect_right(self._stages, step, key=lambda s: s.first_step) - 1]

    def batch_size(self, step: int) -> int:
        """Samples that step `step` (1-based) takes. BadInput below 1."""
        return self._stage_of(_whole("step", step, 1)).batch_size_samples

    def samples_after(self, num_steps: int) -> int:
        """Samples consumed when `num_steps` steps are finished. BadInput below 0."""
        num_steps = _whole("num_steps", num_steps, 0)
        if num_steps == 0:
            return 0
        stage = self._stage_of(num_steps)
        return stage.first_sample + (num_steps + 1 - stage.first_step) * stage.batch_size_samples

    def steps_within(self, num_samples: int) -> int:
        """Most whole steps that `num_samples` samples suffice for; BadInput below 0.

        The last partial batch is dropped, as Megatron does for --train-samples: 115311 steps for
        the 220,000,000 samples of BLOOM-176B.
        """
        num_samples = _whole("num_samples", num_samples, 0)
        last = bisect_right(self._stages, num_samples, key=lambda s: s.first_sample) - 1
        stage = self._stages[last]
        return stage.first_step - 1 + (num_samples - stage.first_sample) // stage.batch_size_samples


@dataclasses.dataclass(frozen=True)
class CosineSchedule:
    """Learning rate by samples: linear from 0 to `peak`, half a cosine down to `end`, then `end`.

    `warmup_samples` may be 0. `decay_samples` counts from sample 0, so it includes the warm-up.

    The update of step s uses lr(samples_after(s - 1)), so the first update of a run with warm-up
    uses 0. The learning rate logged at step s is lr(samples_after(s)), as in the logs of BLOOM:
    the optimizer moves first and the schedule after it.

    Source: megatron/learning_rates.py of Megatron-DeepSpeed, in its order of operations.
    Raises BadInput unless 0 <= end <= peak and 0 <= warmup_samples < decay_samples.
    """

    peak: float
    end: float
    warmup_samples: int
    decay_samples: int

    def __post_init__(self) -> None:
        for name in ("peak", "end"):
            value = getattr(self, name)
            try:
                number = math.nan if isinstance(value, bool | str) else float(value)
            except TypeError:
                number = math.nan
            if not (math.isfinite(number) and number >= 0):
                raise BadInput(
                    f"CosineSchedule: {name} must be a number of at least 0, got {value!r}"
                )
            object.__setattr__(self, name, number)
        for name, minimum in (("warmup_samples", 0), ("decay_samples", 1)):
            value = _whole(f"CosineSchedule: {name}", getattr(self, name), minimum)
            object.__setattr__(self, name, value)
        if self.end > self.peak:
            raise BadInput(f"CosineSchedule: end={self.end} is above peak={self.peak}")
        if self.warmup_samples >= self.decay_samples:
            raise BadInput(
                f"CosineSchedule: warmup_samples={self.warmup_samples} must be below "
                f"decay_samples={self.decay_samples}, which includes the warm-up"
            )

    def __call__(self, samples: int) -> float:
        """Learning rate (float64) after `samples` consumed samples. BadInput below 0."""
        samples = _whole("samples", samples, 0)
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.peak * samples / self.warmup_samples
        if samples > self.decay_samples:
            return self.end
        done = (samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        return self.end + 0.5 * (math.cos(math.pi * done) + 1.0) * (self.peak - self.end)


def run_length_steps(
    schedule: BatchSchedule, train_steps: int | None, train_samples: int | None
) -> int:
    """Steps of a run whose length is given either in steps or in samples.

    Raises BadInput unless exactly one of the two is given, and if the samples do not fill the
    first batch.
    """
    if (train_steps is None) == (train_samples is None):
        both = "neither is" if train_steps is None else "both are"
        raise BadInput(
            f"exactly one of TRAIN_STEPS and TRAIN_SAMPLES must be set, {both} "
            f"(TRAIN_STEPS={train_steps}, TRAIN_SAMPLES={train_samples}); give "
            "--gin.TRAIN_STEPS=1000 --gin.TRAIN_SAMPLES=None, or the other way round"
        )
    if train_steps is not None:
        return _whole("TRAIN_STEPS", train_steps, 1)
    num_samples = _whole("TRAIN_SAMPLES", train_samples, 1)
    num_steps = schedule.steps_within(num_samples)
    if num_steps == 0:
        raise BadInput(
            f"TRAIN_SAMPLES={num_samples} does not fill the first batch of "
            f"{schedule.batch_size(1)} samples"
        )
    return num_steps
