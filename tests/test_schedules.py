"""Schedules against the logs of BLOOM and a step-by-step simulation of Megatron's loop."""

import importlib.util
import json
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bloomjax import config
from bloomjax.errors import BadInput
from bloomjax.schedules import BatchSchedule, CosineSchedule, Stage, run_length_steps

# --rampup-batch-size 192 16 9_765_625 --global-batch-size 2048 --lr 6e-5 --min-lr 6e-6
# --lr-warmup-samples 183_105 --lr-decay-samples 200_000_000 --train-samples 220_000_000:
# bigscience-workshop/bigscience, train/tr11-176B-ml/tr11-176B-ml.slurm.
BLOOM_176B = BatchSchedule(2048, 192, 16, 9_765_625)
BLOOM_176B_LR = CosineSchedule(6e-5, 6e-6, 183_105, 200_000_000)

# Iteration, consumed samples, consumed tokens, global batch size and learning rate. The rows of
# 12695, 42780 and 45000 agree with the published lines of the log (chronicles of tr11-176B-ml).
GOLDEN_176B = [
    (1, 192, 393_216, 192, 6.291472106168593e-08),
    (2, 384, 786_432, 192, 1.2582944212337185e-07),
    (100, 19_200, 39_321_600, 192, 6.291472106168593e-06),
    (438, 84_096, 172_228_608, 192, 2.7556647825018434e-05),
    (5000, 1_536_592, 3_146_940_416, 480, 5.999388690858198e-05),
    (12_695, 9_841_584, 20_155_564_032, 2048, 5.968929240863751e-05),
    (42_780, 71_455_664, 146_341_199_872, 2048, 4.474950714766719e-05),
    (42_784, 71_463_856, 146_357_977_088, 2048, 4.4746376053293954e-05),
    (45_000, 76_002_224, 155_652_554_752, 2048, 4.2983277504129964e-05),
    (94_767, 177_925_040, 364_390_481_920, 2048, 7.6099228039849574e-06),
    (94_768, 177_927_088, 364_394_676_224, 2048, 7.60962710125547e-06),
    (95_000, 178_402_224, 365_367_754_752, 2048, 7.541736208184244e-06),
]
# The lines as BLOOM printed them: iteration, consumed samples, learning rate.
LOGGED_176B = [
    (12_695, 9_841_584, "5.969E-05"),
    (31_214, 47_768_496, "5.279E-05"),
    (42_780, 71_455_664, "4.475E-05"),
    (45_000, 76_002_224, "4.298E-05"),
    (85_376, 158_692_272, "1.150E-05"),
]
# Final batch, ramp increment, peak, end; the ramps start at 192 and last 9,765,625 samples.
# bigscience-workshop/bigscience, train/tr11-176B-ml/smaller_models/*.slurm.
SMALLER = {
    "560m": (256, 32, 3e-4, 1e-5),
    "1b1": (256, 16, 2.5e-4, 1e-5),
    "1b7": (512, 16, 2e-4, 1e-5),
    "3b": (512, 32, 1.6e-4, 1e-5),
    "7b1": (512, 32, 1.2e-4, 1e-5),
}
# These give other sizes when the boundaries are computed exactly instead of in float64.
FLOAT_RAMPS = [(31, 1, 1, 77), (27, 2, 1, 245), (117, 1, 4, 10), (124, 8, 4, 500), (57, 2, 1, 1000)]
RAMPS = [
    (2048, 192, 16, 9_765_625),
    (2048, 16, 16, 9_765_625),
    (512, 192, 32, 9_765_625),
    (256, 192, 16, 9_765_625),
    (64, 8, 8, 1),
    (64, 8, 8, 7),
    (9, 1, 1, 3),
    (64, 8, 56, 1000),
    (29, 7, 2, 1009),  # a boundary where the float product of the increment lies above it
    (47, 2, 3, 249),  # a step that starts at the very end of the ramp and is not the final size
    *FLOAT_RAMPS,
]


def megatron_batch_size(ramp, consumed):
    """The rule of RampupBatchsizeNumMicroBatches.update, megatron/microbatches.py."""
    final, start, increment, length = ramp
    if consumed > length:
        return final
    samples_per_increment = length / ((final - start) // increment)
    return start + int(consumed / samples_per_increment) * increment


def megatron_train_iters(ramp, train_samples):
    """update_train_iters of megatron/training.py: the ramp, then whole steps of the rest."""
    consumed = iterations = 0
    while consumed <= ramp[3]:
        consumed += megatron_batch_size(ramp, consumed)
        iterations += 1
    return iterations + (train_samples - consumed) // ramp[0]


@pytest.mark.parametrize("step,samples,tokens,batch_size,learning_rate", GOLDEN_176B)
def test_the_rows_of_bloom_176b(step, samples, tokens, batch_size, learning_rate):
    assert BLOOM_176B.samples_after(step) == samples
    assert BLOOM_176B.samples_after(step) * 2048 == tokens
    assert BLOOM_176B.batch_size(step) == batch_size
    assert BLOOM_176B_LR(samples) == learning_rate  # exactly, not within a tolerance


@pytest.mark.parametrize("step,samples,learning_rate", LOGGED_176B)
def test_the_log_lines_of_bloom_176b(step, samples, learning_rate):
    assert BLOOM_176B.samples_after(step) == samples
    assert f"{BLOOM_176B_LR(samples):.3E}" == learning_rate


def test_first_update_uses_zero_and_its_log_line_does_not():
    assert BLOOM_176B_LR(BLOOM_176B.samples_after(0)) == 0.0
    assert BLOOM_176B_LR(BLOOM_176B.samples_after(1)) > 0.0


def test_bloom_176b_has_115311_whole_steps():
    assert BLOOM_176B.steps_within(220_000_000) == 115_311
    assert BLOOM_176B.samples_after(115_311) <= 220_000_000 < BLOOM_176B.samples_after(115_312)


# Published checkpoints of the model cards: step, tokens in billions, learning rate.
@pytest.mark.parametrize(
    "name,step,billion_tokens,learning_rate",
    [("1b7", 340_500, "344.8", "2.15e-05"), ("3b", 337_250, "340.5", "2.03e-05")],
)
def test_the_published_checkpoints_of_smaller_models(name, step, billion_tokens, learning_rate):
    final, increment, peak, end = SMALLER[name]
    samples = BatchSchedule(final, 192, increment, 9_765_625).samples_after(step)
    assert f"{samples * 2048 / 1e9:.1f}" == billion_tokens
    assert f"{CosineSchedule(peak, end, 183_105, 200_000_000)(samples):.2e}" == learning_rate


# The step in which the training loop of each model passes 341B tokens.
@pytest.mark.parametrize("name,step", [("560m", 659_489), ("1b1", 657_784), ("7b1", 337_713)])
def test_the_step_that_passes_341_billion_tokens(name, step):
    final, increment, _, _ = SMALLER[name]
    schedule = BatchSchedule(final, 192, increment, 9_765_625)
    assert schedule.steps_within(341_000_000_000 // 2048) + 1 == step


@pytest.mark.parametrize("ramp", RAMPS)
def test_every_step_is_megatrons(ramp):
    schedule = BatchSchedule(*ramp)
    consumed, step = 0, 0
    after_the_ramp = 0
    while after_the_ramp < 3:
        size = megatron_batch_size(ramp, consumed)
        step += 1
        assert schedule.batch_size(step) == size
        assert schedule.samples_after(step - 1) == consumed
        assert schedule.steps_within(consumed) == step - 1
        assert schedule.steps_within(consumed + size - 1) == step - 1
        after_the_ramp += consumed > ramp[3]
        consumed += size
        assert schedule.samples_after(step) == consumed


@pytest.mark.parametrize("ramp", FLOAT_RAMPS)
def test_the_float_ramps_do_differ_from_exact_boundaries(ramp):
    """Or test_every_step_is_megatrons would not notice an implementation in integers."""
    final, start, increment, length = ramp
    per_increment = Fraction(length, (final - start) // increment)
    schedule = BatchSchedule(*ramp)
    consumed, exact, ours = 0, [], []
    for step in range(1, 400):
        exact.append(final if consumed > length else start + consumed // per_increment * increment)
        ours.append(schedule.batch_size(step))
        consumed += exact[-1]
    assert ours != exact


@pytest.mark.parametrize("ramp", [r for r in RAMPS if r[3] > 100_000])
@pytest.mark.parametrize("train_samples", [10_000_000, 12_345_678, 220_000_000])
def test_steps_within_is_megatrons_train_iters(ramp, train_samples):
    assert BatchSchedule(*ramp).steps_within(train_samples) == megatron_train_iters(
        ramp, train_samples
    )


def test_stages_are_contiguous_and_cover_every_increment():
    stages = BLOOM_176B.stages()
    assert [s.batch_size_samples for s in stages] == list(range(192, 2049, 16))
    for before, after in zip(stages, stages[1:], strict=False):
        assert before.num_steps is not None
        assert after.first_step == before.first_step + before.num_steps
        end = before.first_sample + before.num_steps * before.batch_size_samples
        assert after.first_sample == end
    assert stages[0] == Stage(1, 0, 192, 439)
    assert stages[-1].num_steps is None


def test_an_increment_shorter_than_a_step_is_skipped():
    # 5 samples an increment, 8 a step: sizes jump over increments, as in Megatron.
    sizes = [s.batch_size_samples for s in BatchSchedule(48, 8, 8, 25).stages()]
    assert sizes == [8, 16, 40, 48]


def test_constant_batch():
    for schedule in (BatchSchedule(512), BatchSchedule(512, 512, 16, 1000)):
        assert schedule.stages() == (Stage(1, 0, 512, None),)
        assert schedule.batch_size(7) == 512
        assert schedule.samples_after(0) == 0
        assert schedule.samples_after(1000) == 512_000
        assert schedule.steps_within(511) == 0
        assert schedule.steps_within(512_511) == 1000


def test_a_billion_steps_without_a_loop_over_steps():
    begin = time.perf_counter()
    for step in range(10**9, 10**9 + 1000):
        assert BLOOM_176B.steps_within(BLOOM_176B.samples_after(step)) == step
    slow = BatchSchedule(3, 1, 1, 10**12)
    assert slow.samples_after(slow.steps_within(10**12)) <= 10**12
    assert time.perf_counter() - begin < 2.0


def test_numpy_integers_do_not_overflow():
    schedule = BatchSchedule(np.int32(2048), np.int32(192), np.int32(16), np.int32(9_765_625))
    assert schedule == BLOOM_176B
    assert schedule.samples_after(np.int32(2_000_000)) == BLOOM_176B.samples_after(2_000_000)
    assert type(schedule.samples_after(np.int32(2_000_000))) is int
    json.dumps(schedule.batch_size(np.int64(3)))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0,), "batch_size_samples must be a whole number of at least 1, got 0"),
        ((-4,), "got -4"),
        ((None,), "batch_size_samples must be a whole number of at least 1, got None"),
        ((512.0,), "got 512.0"),
        (("512",), "got '512'"),
        ((True,), "got True"),
        ((512, 0, 16, 100), "ramp_start_samples must be"),
        ((512, 192, 0, 100), "ramp_increment_samples must be"),
        ((512, 192, -16, 100), "ramp_increment_samples must be"),
        ((512, 192, 16, 0), "ramp_length_samples must be"),
        ((512, 192, 16, 1e6), "ramp_length_samples must be"),
        ((512, 192), "missing: ramp_increment_samples, ramp_length_samples"),
        ((512, None, 16, 100), "missing: ramp_start_samples"),
        ((512, 192, 16, None), "missing: ramp_length_samples"),
        ((512, 528, 16, 100), "ramp_start_samples=528 is above batch_size_samples=512"),
        ((512, 192, 24, 100), "ramp_increment_samples=24 does not divide"),
        ((512, 192, 512, 100), "ramp_increment_samples=512 does not divide"),
    ],
)
def test_bad_batch_schedules(arguments, message):
    with pytest.raises(BadInput) as caught:
        BatchSchedule(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method,argument",
    [("batch_size", 0), ("batch_size", 1.0), ("samples_after", -1), ("steps_within", -1)],
)
def test_bad_lookups(method, argument):
    with pytest.raises(BadInput, match="must be a whole number"):
        getattr(BLOOM_176B, method)(argument)


def test_cosine_edges():
    lr = CosineSchedule(peak=1e-3, end=1e-4, warmup_samples=100, decay_samples=1100)
    assert lr(0) == 0.0
    assert lr(50) == 5e-4
    assert lr(100) == 1e-3
    assert lr(101) < 1e-3
    assert lr(600) == pytest.approx((1e-3 + 1e-4) / 2, rel=1e-15)
    assert lr(1100) == 1e-4
    assert lr(1101) == lr(10**12) == 1e-4


def test_cosine_against_a_numpy_curve():
    lr = CosineSchedule(peak=3e-4, end=1e-5, warmup_samples=183_105, decay_samples=200_000_000)
    samples = np.linspace(183_106, 200_000_000, 1001).astype(np.int64)
    angle = np.pi * (samples - 183_105.0) / (200_000_000.0 - 183_105.0)
    expected = 1e-5 + (3e-4 - 1e-5) * np.cos(angle / 2) ** 2
    np.testing.assert_allclose([lr(n) for n in samples], expected, rtol=1e-13)


def test_cosine_without_warm_up_starts_at_the_peak():
    assert CosineSchedule(peak=1e-3, end=0.0, warmup_samples=0, decay_samples=10)(0) == 1e-3


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((-1e-3, 0.0, 10, 100), "peak must be a number of at least 0"),
        ((math.nan, 0.0, 10, 100), "peak must be"),
        ((math.inf, 0.0, 10, 100), "peak must be"),
        (("6e-5", 0.0, 10, 100), "peak must be"),
        ((None, 0.0, 10, 100), "peak must be"),
        ((1e-3, -1e-4, 10, 100), "end must be"),
        ((1e-3, 1e-2, 10, 100), "end=0.01 is above peak=0.001"),
        ((1e-3, 1e-4, -1, 100), "warmup_samples must be"),
        ((1e-3, 1e-4, 10.0, 100), "warmup_samples must be"),
        ((1e-3, 1e-4, 0, 0), "decay_samples must be"),
        ((1e-3, 1e-4, 100, 100), "warmup_samples=100 must be below decay_samples=100"),
    ],
)
def test_bad_cosines(arguments, message):
    with pytest.raises(BadInput) as caught:
        CosineSchedule(*arguments)
    assert message in str(caught.value)


def test_cosine_of_negative_samples():
    with pytest.raises(BadInput, match="samples must be"):
        BLOOM_176B_LR(-1)


def test_run_length():
    assert run_length_steps(BLOOM_176B, 1000, None) == 1000
    assert run_length_steps(BLOOM_176B, None, 220_000_000) == 115_311


@pytest.mark.parametrize(
    "train_steps,train_samples,message",
    [
        (10, 1000, "both are"),
        (None, None, "neither is"),
        (0, None, "TRAIN_STEPS must be"),
        (10.0, None, "TRAIN_STEPS must be"),
        (None, -1, "TRAIN_SAMPLES must be"),
        (None, 191, "TRAIN_SAMPLES=191 does not fill the first batch of 192 samples"),
    ],
)
def test_bad_run_lengths(train_steps, train_samples, message):
    with pytest.raises(BadInput) as caught:
        run_length_steps(BLOOM_176B, train_steps, train_samples)
    assert message in str(caught.value)


def test_run_length_says_how_to_set_one():
    with pytest.raises(BadInput, match=r"--gin\.TRAIN_STEPS=\d+ --gin\.TRAIN_SAMPLES=None"):
        run_length_steps(BLOOM_176B, 10, 10)


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parent.parent / "tools" / "schedule_table.py"
    spec = importlib.util.spec_from_file_location("schedule_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_rows(tool):
    rows = list(tool.schedule_table(BLOOM_176B, BLOOM_176B_LR, 2048, [r[0] for r in GOLDEN_176B]))
    assert list(rows[0]) == ["step", "batch_size", "samples", "tokens", "learning_rate"]
    for row, (step, samples, tokens, batch_size, learning_rate) in zip(
        rows, GOLDEN_176B, strict=True
    ):
        assert list(row.values()) == [step, batch_size, samples, tokens, learning_rate]


def test_table_steps(tool):
    assert tool.parse_steps("1,100, 12695") == [1, 100, 12_695]


@pytest.mark.parametrize("steps", ["0", "-1", "1,-5", "ten", "1,,2", "", "1.5", "1e3"])
def test_bad_table_steps_are_one_line(tool, steps, capsys):
    with pytest.raises(SystemExit) as exit_:
        config.call(tool.main, ["schedule_table", f"--steps={steps}"], tool._FLAGS)
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"--steps={steps}:" in captured.err
