"""The sequence-length curriculum against DeepSpeed's rule step by step, and against the tokens themselves."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import tiny_model

from bloomjax import config, plan_measure
from bloomjax import train as train_module
from bloomjax.curriculum import CutMixture, LengthCurriculum
from bloomjax.data import Phase, TrainData
from bloomjax.errors import BadInput
from bloomjax.language_report import epochs_seen
from bloomjax.optimizer import adamw
from bloomjax.schedules import BatchSchedule
from bloomjax.skips import Skips
from bloomjax.train_state import abstract_state
from bloomjax.train_step import StepOptions, jit_programs, make_gradient

RAMP = (24, 8, 8, 160)  # 8 samples a step, 16 after 80, 24 after 160
# Start, end, step, steps, ramp. The first is BigScience's (train/tr8b-104B/tr8b-104B-cl.slurm), the second with tr11's
# ramp; then fewer steps than lengths, lengths that are no round part of the range, and the longest at once.
CASES = {
    "bigscience": (64, 2048, 8, 36_000, (2048,)),
    "ramp": (64, 2048, 8, 36_000, (2048, 192, 16, 9_765_625)),
    "hasty": (64, 2048, 8, 100, (24, 8, 8, 160)),
    "odd": (56, 1001, 7, 977, (31, 1, 1, 77)),
    "leap": (16, 32, 16, 1, (8,)),
}


def curriculum_of(case, **changes):
    start, end, step, num_steps, batch = CASES[case]
    options = dict(start=start, end=end, step=step, num_steps=num_steps)
    return LengthCurriculum(**options, batch_schedule=BatchSchedule(*batch), **changes)


def deepspeed(start: int, end: int, step: int, num_steps: int) -> Iterator[int]:
    """Length of each training step, as the engine asks its scheduler: before the step, with the number of finished
    ones plus 1, and no longer once the end is reached."""
    now, finished = start, 0
    while True:
        if now < end:
            share = (float(finished + 1) / num_steps) ** 1.0
            wanted = math.floor(share * (end - start) + start)
            wanted -= wanted % step
            now = min(wanted, end)
        yield now
        finished += 1


def megatron(final: int, start: int = 0, increment: int = 0, length: int = 0) -> Iterator[int]:
    """Samples of each training step: megatron/microbatches.py, update(consumed_samples) before each."""
    consumed = 0
    while True:
        size = final
        if increment and final != start and consumed <= length:
            increments = int(consumed / (length / ((final - start) // increment)))
            size = min(start + increments * increment, final)
        yield size
        consumed += size


@pytest.mark.parametrize("case", CASES)
def test_length_and_batch_of_every_step(case):
    start, end, step, num_steps, batch = CASES[case]
    curriculum = curriculum_of(case)
    lengths, sizes = deepspeed(start, end, step, num_steps), megatron(*batch)
    samples = tokens = 0
    firsts, before = [], None
    for number, length, size in zip(range(1, num_steps + 200), lengths, sizes, strict=False):
        assert curriculum.length(number) == length
        assert curriculum.batch_schedule.batch_size(number) == size
        if length != before:
            firsts.append((number, samples, tokens, length))
        before = length
        samples += size
        tokens += size * length
        if number % 97 == 0 or (number, length) == (num_steps, end) or firsts[-1][0] == number:
            assert curriculum.tokens_after(samples) == tokens
    assert [tuple(stage) for stage in curriculum.stages] == firsts
    assert before == end and 1 <= len(curriculum.buckets) <= 8 and curriculum.buckets[-1] == end


def test_published_table_of_the_overlay(tmp_path):
    """BigScience's curriculum at chosen steps, by hand: 64 + 1984 s / 36000, down to a multiple of 8."""
    path = tmp_path / "both.gin"
    path.write_text("include '560m.gin'\ninclude 'ablations/curriculum.gin'\n")
    built = config.build("TrainData.curriculum", path)
    assert (built.start, built.end, built.step, built.num_steps) == (64, 2048, 8, 36_000)
    assert built.mode == "truncate" and built.batch_schedule.ramp_length_samples == 9_765_625
    assert [built.length(s) for s in (1, 145, 146, 291, 18_000, 35_999, 36_000)] == [
        64, 64, 72, 80, 1056, 2040, 2048,
    ]  # fmt: skip
    assert built.buckets == (256, 512, 768, 1024, 1280, 1536, 1792, 2048)
    assert len(built.stages) == 249
    assert built.bucket(256) == 256 and built.bucket(264) == 512


@pytest.mark.parametrize("case", CASES)
def test_programs_are_those_of_every_step(case):
    curriculum = curriculum_of(case)
    num_rows = functools.partial(lambda multiple, n: -(-n // multiple) * multiple, 16)
    for num_steps in (1, 50, curriculum.num_steps + 100):
        shapes = {}
        for step in range(1, num_steps + 1):
            rows = num_rows(curriculum.batch_schedule.batch_size(step))
            length = min(b for b in curriculum.buckets if b >= curriculum.length(step))
            shapes.setdefault((rows, length), step)
        assert curriculum.programs(num_steps, num_rows) == shapes
        if curriculum.batch_schedule.ramp_start_samples is None:
            assert len(shapes) <= 8


@pytest.mark.parametrize("block_tokens", [24, 48])
def test_cut_samples_lose_nothing_and_repeat_nothing(block_tokens):
    """Every token of every block of an epoch, once, in samples of DeepSpeed's length or what is left of a block."""
    curriculum = LengthCurriculum(4, 24, 2, 60, BatchSchedule(12, 3, 3, 60), "phases")
    shares, sizes = {"aa": 0.6, "bb": 0.3, "cc": 0.1}, {"aa": 41, "bb": 17, "cc": 5}
    num_tokens = {name: size * block_tokens + 3 for name, size in sizes.items()}
    mixture = curriculum.mixture(shares, num_tokens, seed=5, block_tokens=block_tokens)
    num = 1500
    samples = np.arange(num)
    source, epoch, start = mixture.locate(samples)
    lengths = mixture.sizes(samples, start)
    steps = zip(range(200), deepspeed(4, 24, 2, 60), megatron(12, 3, 3, 60), strict=False)
    longest = [length for _, length, size in steps for _ in range(size)]
    seen: dict[tuple[int, int], list[int]] = {}
    for s in range(num):
        left = block_tokens - start[s] % block_tokens
        assert lengths[s] == min(longest[s], left)
        tokens = range(start[s] + 1, start[s] + lengths[s] + 1)  # those that are predicted
        seen.setdefault((int(source[s]), int(epoch[s])), []).extend(tokens)
    for number, name in enumerate(mixture.names):
        epochs = sorted(e for s, e in seen if s == number)
        assert epochs == list(range(len(epochs)))
        for e in epochs:
            found = seen[number, e]
            assert len(set(found)) == len(found)
            if e < epochs[-1]:  # a whole one
                assert sorted(found) == list(range(1, sizes[name] * block_tokens + 1))
    for k in (0, 1, 3, 4, 100, 333, num):
        assert mixture.tokens_after(k) == lengths[:k].sum()
        by_source = {
            n: int(lengths[:k][source[:k] == i].sum()) for i, n in enumerate(mixture.names)
        }
        assert mixture.tokens_by_source(k) == by_source
        share = np.array([mixture.counts(k)[name] for name in mixture.names])
        assert (
            np.abs(share - k * np.array([0.6, 0.3, 0.1])) < 2
        ).all()  # over all lengths together


def train_data(text, mode, start=4, num_steps=20, step=2, batch=RAMP, **changes):
    length = tiny_run.SEQUENCE_LENGTH
    curriculum = LengthCurriculum(
        start, length, step, num_steps, BatchSchedule(*batch), mode, changes.pop("num_buckets", 3)
    )
    return TrainData(
        store_dir=str(text.store_dir), sequence_length=length, seed=3, curriculum=curriculum, **changes
    )  # fmt: skip


def rows_of(num_samples):
    return -(-num_samples // 16) * 16


@pytest.mark.parametrize("mode, block_tokens", [("truncate", 16), ("phases", 16), ("phases", 48)])
def test_batches_hold_the_tokens_of_the_step(tiny_text, mesh_of, mode, block_tokens):
    data = train_data(tiny_text, mode, block_tokens=block_tokens).open()
    curriculum, mesh = data.curriculum, mesh_of(2, 2, 1)
    assert curriculum
    assert data.sequence_length == 16 and curriculum.buckets == (6, 12, 16)
    whole = TrainData(store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3).open()
    num_tokens = reaches = 0
    for step in range(1, 24):
        schedule = curriculum.batch_schedule
        batch = data.batch(step, schedule, mesh, rows_of)
        samples, length = data.samples_of(step, schedule), curriculum.length(step)
        tokens, weights = np.asarray(batch["tokens"]), np.asarray(batch["token_weights"])
        rows = rows_of(len(samples))
        bucket = min(b for b in (6, 12, 16) if b >= length)
        assert tokens.shape == (rows, bucket + 1) and weights.shape == (rows, bucket)
        np.testing.assert_array_equal(np.asarray(batch["weights"]), np.arange(rows) < len(samples))
        source, _, start = data.mixture.locate(samples)
        if mode == "truncate":
            start, sizes = start * 16, np.full(len(samples), length)
            np.testing.assert_array_equal(
                tokens[: len(samples), : length + 1], whole.rows(samples)[:, : length + 1]
            )
        else:
            sizes = np.minimum(length, block_tokens - start % block_tokens)
            if block_tokens == 48 and length > 8:
                reaches += int((start % 16 + sizes > 16).sum())
        for row, (number, first, size) in enumerate(zip(source, start, sizes, strict=True)):
            store, language = data.sources[data.mixture.names[number]]
            expected = store.read(language, "train", int(first), int(first + size + 1))
            np.testing.assert_array_equal(tokens[row, : size + 1], expected)
            assert not tokens[row, size + 1 :].any()
            np.testing.assert_array_equal(weights[row], np.arange(bucket) < size)
        num_tokens += int((np.asarray(batch["weights"])[:, None] * weights).sum())
        assert data.kept.tokens_after(schedule.samples_after(step)) == num_tokens
    assert block_tokens == 16 or reaches > 10  # from a window into the next
    schedule = curriculum.batch_schedule
    seen = data.kept.tokens_by_source(schedule.samples_after(23))
    assert sum(seen.values()) == num_tokens
    epochs = epochs_seen(data.kept, data.sources, schedule.samples_after(23))
    store = data.store
    num_blocks = store.num_windows("aa", "train", block_tokens)
    assert epochs["aa"] == seen["aa"] / (num_blocks * block_tokens)


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_the_tokens_alone(tiny_text, mesh_of):
    """float32, by the program that knows nothing of token weights, on the same tokens without any that fill."""
    data = train_data(tiny_text, "truncate", batch=(8,)).open()
    mesh = mesh_of(1, 1, 1)
    assert data.curriculum
    step = next(s for s in range(1, 20) if data.curriculum.length(s) == 8)
    batch = jax.tree.map(np.asarray, data.batch(step, BatchSchedule(8), mesh, rows_of))
    assert batch["tokens"].shape == (16, 13)  # 8 of 16 rows, 8 of 12 tokens
    plain = {"tokens": batch["tokens"][:8, :9], "weights": np.ones(8, np.float32)}
    model = tiny_model(dtype="float32", num_layers=1)
    options = StepOptions()
    abstract = abstract_state(model, adamw(), mesh)
    params = jit_programs(model, adamw(), options, mesh, abstract)[0](3).params
    gradient = jax.jit(make_gradient(model, options), static_argnums=3)
    expected_loss, expected, _ = gradient(params, plain, None, 1)
    loss, grads, _ = gradient(params, batch, None, 2)
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()) + 1e-9, rtol=1e-4)
    all_ones = batch | {"token_weights": np.ones_like(batch["token_weights"])}
    unlike = gradient(params, all_ones, None, 2)[0]
    assert abs(unlike - expected_loss) > 1e-3  # the test can fail


def test_token_weights_of_rows_with_different_lengths(tiny_text, mesh_of):
    """The mean over tokens, not over rows; by a float64 softmax on the logits."""
    data = train_data(tiny_text, "phases", start=6, num_steps=30, batch=(8,)).open()
    mesh, model, options = (
        mesh_of(1, 1, 1),
        tiny_model(dtype="float32", num_layers=1),
        StepOptions(),
    )
    batch = data.batch(2, BatchSchedule(8), mesh, rows_of)
    sizes = np.asarray(batch["token_weights"]).sum(1)[:8]
    assert len(set(sizes.tolist())) > 1
    programs = jit_programs(model, adamw(), options, mesh, abstract_state(model, adamw(), mesh))
    params = programs[0](3).params
    loss = jax.jit(lambda *x: make_gradient(model, options)(*x, None, 1)[0])(params, batch)
    rows = data.cut_rows(data.samples_of(2, BatchSchedule(8)))
    assert [len(row) - 1 for row in rows] == sizes.tolist()

    @jax.jit
    def logits(params, tokens):
        hidden = model.apply({"params": params}, tokens)
        return model.apply({"params": params}, hidden, method="logits")

    tokens = np.asarray(batch["tokens"])[:8]
    z = np.asarray(logits(params, tokens[:, :-1]), np.float64)
    targets = np.take_along_axis(z, tokens[:, 1:, None], -1)[..., 0]
    nll = np.log(np.exp(z).sum(-1)) - targets
    parts = [row[: int(size)] for row, size in zip(nll, sizes, strict=True)]
    assert loss == pytest.approx(np.concatenate(parts).mean(), rel=1e-6)
    sums = np.asarray(programs[3](params, batch))[:, :8]
    np.testing.assert_allclose(sums[0], [part.sum() for part in parts], rtol=1e-6)
    np.testing.assert_array_equal(sums[1], sizes)


# ---- whole runs ----


def run(text, model_dir, mode, num_steps, **changes):
    """20 steps through both, the ramp (to step 16) and the curriculum (to step 20)."""
    data = train_data(text, mode, num_buckets=2)
    return tiny_run.run(
        text, model_dir, train_data=data, batch_schedule=BatchSchedule(*RAMP), train_steps=num_steps,
        eval_every_steps=100, **changes,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["truncate", "phases"])
def test_a_run_resumed_in_the_middle_of_ramp_and_curriculum(
    tiny_text, tmp_path, capsys, monkeypatch, mode
):
    """To the bit the straight one, of DeepSpeed's lengths and Megatron's batches; compiled is what was announced."""
    programs = []

    def noted(*arguments):
        programs.append(jit_programs(*arguments))
        return programs[-1]

    monkeypatch.setattr(train_module, "jit_programs", noted)
    assert run(tiny_text, tmp_path / "straight", mode, 22) == 0
    assert (
        f"mode {mode}: 7 lengths in 4 programs (8x8 from step 1, 8x16 from step 10, 16x16 from step 11, "
        "24x16 from step 16)"
    ) in capsys.readouterr().out
    assert programs[0][2]._cache_size() == 4
    for num_steps in (14, 22):
        assert run(tiny_text, tmp_path / "resumed", mode, num_steps) == 0
    straight, resumed = (
        [record for record in tiny_run.records(tmp_path / name) if record["step"]]
        for name in ("straight", "resumed")
    )
    names = "step", "loss", "grad_norm", "tokens", "samples", "batch_size", "learning_rate"
    for a, b in zip(straight, resumed, strict=True):
        assert [a[name] for name in names] == [b[name] for name in names]
    states = [tiny_run.fingerprints(tmp_path / name, 22) for name in ("straight", "resumed")]
    assert states[0] == states[1]
    assert [r["step"] for r in straight] == list(range(1, 23))
    assert [r["batch_size"] for r in straight][9:16] == [
        8,
        16,
        16,
        16,
        16,
        16,
        24,
    ]  # step 14 is inside
    tokens = 0
    for record, length, size in zip(
        straight, deepspeed(4, 16, 2, 20), megatron(*RAMP), strict=False
    ):
        assert record["batch_size"] == size
        before, tokens = tokens, record["tokens"]
        assert 0 < tokens - before <= size * length
        assert mode == "phases" or tokens - before == size * length
    with pytest.raises(BadInput, match="holds a run with other data: there curriculum="):
        tiny_run.run(
            tiny_text, tmp_path / "resumed", train_data=train_data(tiny_text, mode, num_steps=24),
            batch_schedule=BatchSchedule(*RAMP), train_steps=24,
        )  # fmt: skip


# ---- what else asks for it ----


def test_skipped_samples_are_counted_as_they_are_seen(tiny_text):
    """Truncated: length by position, so that deleted samples change no number of tokens. Cut: of what is left."""
    skips, num = Skips.of([(20, 28)]), 100
    truncated = train_data(tiny_text, "truncate", batch=(8,)).open()
    before = truncated.kept.tokens_after(num)
    truncated.skip(skips)
    assert truncated.kept.tokens_after(num) == before
    assert sum(truncated.kept.tokens_by_source(num).values()) == before
    cut = train_data(tiny_text, "phases", batch=(8,)).open()
    mixture = cut.mixture
    assert isinstance(mixture, CutMixture)
    cut.skip(cut.without(16, 8, BatchSchedule(8)))
    samples = cut.kept.samples(0, num)
    assert not set(range(16, 24)) & set(samples.tolist())
    sizes = mixture.sizes(samples, mixture.locate(samples)[2])
    assert cut.kept.tokens_after(num) == sizes.sum()
    assert sum(cut.kept.tokens_by_source(num).values()) == sizes.sum()
    assert cut.first_step_like(50, BatchSchedule(8)) == 1


def test_plan_asks_for_the_longest_batch():
    curriculum = curriculum_of("bigscience")
    absent: Any = None
    setup = plan_measure.Setup(
        absent, absent, absent, absent, curriculum.batch_schedule, 40_000, 2048, curriculum=curriculum
    )  # fmt: skip
    lengths = deepspeed(*CASES["bigscience"][:4])
    expected = sum(2048 * n for _, n in zip(range(40_000), lengths, strict=False))
    assert setup.planned_tokens == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": 60}, "step=8 does not divide start=60"),
        ({"end": 2044}, "step=8 does not divide end=2044"),
        ({"start": 4096}, "start=4096 is not below end=2048"),
        ({"start": 2048}, "start=2048 is not below end=2048"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"mode": "cut"}, "no LengthCurriculum.mode 'cut'; there are: truncate, phases"),
    ],
)
def test_curricula_that_cannot_be(changes, message):
    options = dict(start=64, end=2048, step=8, num_steps=100, batch_schedule=BatchSchedule(8))
    with pytest.raises(BadInput, match=message):
        LengthCurriculum(**(options | changes))


def test_what_does_not_go_with_a_curriculum(tiny_text):
    with pytest.raises(BadInput, match="TrainData.phases need LengthCurriculum.mode='truncate'"):
        train_data(tiny_text, "phases", phases=[Phase(80, weights={"aa": 1.0})])
    with pytest.raises(BadInput, match="exclude each other"):
        train_data(tiny_text, "truncate", phases=[Phase(80, sequence_length=8)])
    with pytest.raises(BadInput, match="block_tokens=24 is no multiple of LengthCurriculum.end=16"):
        train_data(tiny_text, "phases", block_tokens=24)
    curriculum = LengthCurriculum(4, 12, 2, 20, BatchSchedule(8))
    with pytest.raises(BadInput, match="end=12 must be TrainData.sequence_length=16"):
        TrainData(store_dir="x", sequence_length=16, seed=3, curriculum=curriculum)
    data = train_data(tiny_text, "truncate").open()
    with pytest.raises(BadInput, match="bind the same object"):
        data.check_phases(BatchSchedule(8), 20)
    weighted = train_data(tiny_text, "truncate", phases=[Phase(80, weights={"aa": 1.0})]).open()
    lines = weighted.check_phases(BatchSchedule(*RAMP), 20)
    assert len(lines) == 2 and "7 lengths in" in lines[0] and "from sample 80" in lines[1]
