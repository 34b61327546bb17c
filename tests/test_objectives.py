"""objectives.py: what each position sees and what counts, by hand, in the model, in the step and in a run."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom
import tiny_run
from reference_bloom import jit

from bloomjax import config
from bloomjax.data import TrainData, put_batch
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.objectives import (
    CausalLM,
    InputsTargets,
    PrefixLM,
    SpanCorruption,
    filling,
    identity,
    position_weights,
)
from bloomjax.preflight import open_matching_vocabulary
from bloomjax.run import held_out_losses
from bloomjax.train_step import (
    StepOptions,
    abstract_batch,
    make_eval_step,
    make_gradient,
)

SHAPE = dict(vocab_size=48, emb_dim=24, num_layers=2, num_heads=6)
END, LENGTH = 2, 12


def model_of(**changes):
    return Bloom(BloomConfig(**(SHAPE | dict(dtype="float32") | changes)))


@pytest.fixture(scope="module")
def params():
    return reference_bloom.random_params(**SHAPE, mlp_dim=96, seed=3)


def windows(num=4, seed=0):
    """Rows of LENGTH + 1 tokens with documents of several lengths."""
    tokens = np.random.default_rng(seed).integers(3, 48, (num, LENGTH + 1)).astype(np.int32)
    for row, ends in zip(tokens, ([0, 5, 6, 11], [3, 12], [], [7]), strict=False):
        row[ends] = END
    return tokens


def windows_for(objective, num=4, seed=0):
    """Those for InputsTargets have separators and padding."""
    tokens = windows(num, seed)
    if isinstance(objective, InputsTargets):
        tokens[:, [2, 8]] = objective.separator_id
        tokens[1, 10:12] = objective.pad_id
    return tokens


@dataclasses.dataclass
class FixedDraws:
    """In place of a random generator: notes what may be drawn and gives the next of `draws`."""

    draws: list[int]
    ranges: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def integers(self, low, high, endpoint=False):
        self.ranges.append((low, high - (not endpoint)))
        return self.draws.pop(0)


def with_draws(monkeypatch, *draws):
    fixed = FixedDraws(list(draws))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: fixed)
    return fixed


# ---- by hand ----


def test_prefix_of_a_row_by_hand(monkeypatch):
    """Six inputs a..f and the label g. The prefix a b c: its last token, c, predicts the first target, d."""
    draws = with_draws(monkeypatch, 3)
    row = PrefixLM().row(np.array([10, 11, 12, 13, 14, 15, 16], np.int32), (0, 0))
    assert draws.ranges == [(1, 6)]
    assert row["token_weights"].tolist() == [0, 0, 1, 1, 1, 1]
    assert row["last_key"].tolist() == [2, 2, 2, 3, 4, 5]
    assert row["tokens"].tolist() == [10, 11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize(
    ("prefix", "weights", "last_key"),
    [(1, [1, 1, 1, 1], [0, 1, 2, 3]), (4, [0, 0, 0, 1], [3, 3, 3, 3])],
)
def test_shortest_and_longest_prefix(monkeypatch, prefix, weights, last_key):
    """The shortest is causal; the longest leaves one target, the label of the last position."""
    with_draws(monkeypatch, prefix)
    row = PrefixLM().row(np.arange(10, 15, dtype=np.int32), (0, 0))
    assert row["token_weights"].tolist() == weights and row["last_key"].tolist() == last_key


def test_prefixes_of_documents_by_hand(monkeypatch):
    """a b c END | END | d END | e f, label g: the second document has no token, so no prefix."""
    draws = with_draws(monkeypatch, 2, 6, 9)
    tokens = np.array([10, 11, 12, END, END, 13, END, 14, 15, 16], np.int32)
    row = PrefixLM(document_end_id=END).row(tokens, (0, 0))
    # After a at least; the end is a target, never part of a prefix. Of the cut document g is the last target.
    assert draws.ranges == [(1, 3), (6, 6), (8, 9)]
    #                                       a  b  c  .  .  d  .  e  f
    assert row["last_key"].tolist() == [1, 1, 2, 3, 4, 5, 6, 8, 8]
    # b predicts c, c its end, d its end, f the label; an end predicts nothing, for d and e are prefixes.
    assert row["token_weights"].tolist() == [0, 1, 1, 0, 0, 1, 0, 0, 1]


def test_a_row_without_a_target_is_causal():
    row = PrefixLM(document_end_id=END).row(np.full(5, END, np.int32), (0, 0))
    assert row["last_key"].tolist() == [0, 1, 2, 3] and row["token_weights"].tolist() == [1] * 4


def test_all_prefixes_are_drawn_equally_often_and_leave_a_target():
    rows = [PrefixLM(seed=5).row(np.arange(9, dtype=np.int32), (0, s)) for s in range(8000)]
    num_targets = np.array([row["token_weights"].sum() for row in rows])
    counts = np.bincount(num_targets.astype(int), minlength=9)
    assert counts[0] == 0 and np.abs(counts[1:] - 1000).max() < 5 * 30
    # Megatron-DeepSpeed divides by (L + 1) / 2: the mean number of targets if none is off by one.
    assert num_targets.mean() == pytest.approx(4.5, abs=0.1)


def test_position_weights(monkeypatch):
    np.testing.assert_allclose(position_weights(4), [8 / 5, 6 / 5, 4 / 5, 2 / 5])
    assert position_weights(2048).mean() == pytest.approx(1, abs=1e-6)
    with_draws(monkeypatch, 3, 3)
    tokens = np.arange(5, dtype=np.int32)
    found = PrefixLM(reweight_by_position=True).row(tokens, (0, 0))["token_weights"]
    np.testing.assert_allclose(found, [0, 0, 4 / 5, 2 / 5])
    everything = PrefixLM(targets_only=False).row(tokens, (0, 0))
    assert everything["token_weights"].tolist() == [1] * 4
    assert everything["last_key"].tolist() == [2, 2, 2, 3]


def test_span_corruption_by_hand(monkeypatch):
    """Of a window of 15 tokens 9 are left: 4 sentinels, <s> and </s> take their places."""
    objective = SpanCorruption(40, 8, noise_density=0.3, mean_span_tokens=1.5)
    sizes = iter([np.array([1, 5]), np.array([2, 1])])
    monkeypatch.setattr("bloomjax.objectives._segments", lambda rng, *numbers: next(sizes))
    row = objective.row(np.arange(10, 25, dtype=np.int32), (0, 0))
    text = [10, 40, 13, 14, 15, 16, 17, 41, 1]
    assert row["tokens"].tolist() == [*text, 40, 11, 12, 41, 18, 2]
    assert row["token_weights"].tolist() == [0] * 8 + [1] * 6  # from <s>, which predicts the first
    assert row["last_key"].tolist() == [8] * 9 + [9, 10, 11, 12, 13]
    assert row["documents"].tolist() == [0] * 14


@pytest.mark.parametrize("length", [6, 17, 64, 2048])
def test_span_corruption_loses_no_token_of_the_text_it_takes(length):
    objective = SpanCorruption(10_000, 200)
    window = np.random.default_rng(0).integers(4, 10_000, length + 1).astype(np.int32)
    rows = [objective.row(window, (0, number)) for number in range(20)]
    num_noise = []
    for row in rows:
        assert len(row["tokens"]) == length + 1
        first = int(np.flatnonzero(row["tokens"] == 1)[0])
        assert row["tokens"][-1] == 2 and (row["tokens"] == 1).sum() == 1
        parts = {}
        targets = row["tokens"][first + 1 : np.flatnonzero(row["tokens"] == 2)[0]].tolist()
        for token in targets:
            if token >= 10_000:
                parts[token] = []
                last = token
            else:
                parts[last].append(token)
        text = [t for token in row["tokens"][:first].tolist() for t in parts.get(token, [token])]
        assert text == window[: len(text)].tolist() and len(text) > 0.4 * length
        assert list(parts) == list(range(10_000, 10_000 + len(parts))) and all(parts.values())
        assert row["token_weights"].sum() == len(targets) + 1
        num_noise.append((len(targets) - len(parts)) / len(text))
    assert len({tuple(row["tokens"]) for row in rows}) > 1 or length < 20
    if length == 2048:
        assert np.mean(num_noise) == pytest.approx(0.15, abs=0.001)
        assert len(text) > 0.9 * length * 0.97 - 4
        with pytest.raises(BadInput, match="num_sentinels is 20"):
            SpanCorruption(10_000, 20).row(window, (0, 0))


def test_span_corruption_looks_for_its_length_once(monkeypatch):
    calls, noise = [], SpanCorruption.noise
    monkeypatch.setattr(SpanCorruption, "noise", lambda self, n: calls.append(n) or noise(self, n))
    window, objective = np.full(212, 5, np.int32), SpanCorruption(10_000, 200)
    rows = [objective.row(window, (0, number)) for number in range(3)]
    assert len(calls) < 212 + 3 and rows[0]["token_weights"].sum() > 0
    before = len(calls)
    SpanCorruption(10_000, 200).row(window, (0, 3))  # an equal one
    assert len(calls) == before + 1


def test_a_window_without_room_for_a_span_is_refused():
    for length in (1, 4):
        error = f"a window of {length} tokens is too short for SpanCorruption, which needs 5"
        with pytest.raises(BadInput, match=error):
            SpanCorruption(10_000, 200).row(np.full(length + 1, 5, np.int32), (0, 0))
    row = SpanCorruption(10_000, 200).row(np.full(6, 5, np.int32), (0, 0))
    assert row["tokens"].tolist() == [5, 10_000, 1, 10_000, 5, 2]


# Three examples, the second without inputs, and padding before what would be the next one: 10 11 -> 12 13, -> 14,
# 15 16 -> 17.
PACKED = [10, 11, 1, 12, 13, 2, 1, 14, 2, 15, 16, 1, 17, 2, 3, 3, 99]


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_inputs_and_targets_by_hand(is_bidirectional):
    row = InputsTargets(is_bidirectional).row(np.array(PACKED, np.int32), (0, 0))
    assert row["tokens"].tolist() == [10, 11, 12, 13, 2, 14, 2, 15, 16, 17, 2, 3, 3, 3, 3, 3, 3]
    # 11 -> 12 -> 13 -> end; 14 -> end, but nothing predicts 14; 16 -> 17 -> end.
    assert row["token_weights"].tolist() == [0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0] + [0] * 5
    assert row["documents"].tolist() == [0] * 5 + [1] * 2 + [2] * 4 + [4] * 5
    seen = [1, 1, *range(2, 7), 8, 8] if is_bidirectional else list(range(9))
    assert row["last_key"].tolist() == seen + list(range(9, 16))


def test_rows_come_from_seed_and_key_alone():
    tokens = windows(1)[0]
    rows = [PrefixLM(seed).row(tokens, key)["last_key"].tolist()
            for seed in (0, 1) for key in [(0, 7), (0, 8), (0, 7)]]  # fmt: skip
    assert rows[0] == rows[2] and rows[3] == rows[5]
    many = {tuple(PrefixLM(s).row(tokens, (k, n))["last_key"].tolist())
            for s in range(3) for k in range(2) for n in range(20)}  # fmt: skip
    assert len(many) > 9


# ---- leaks ----

SPANS = SpanCorruption(44, 4)
OBJECTIVES = [
    CausalLM(), PrefixLM(), PrefixLM(document_end_id=END), SPANS,
    dataclasses.replace(SPANS, is_bidirectional=False), InputsTargets(), InputsTargets(True),
]  # fmt: skip


@functools.cache
def compiled_logits(model):
    @jit
    def logits(params, tokens, last_key, documents):
        x = model.apply({"params": params}, tokens, last_key_BL=last_key, documents_BL=documents)
        return model.apply({"params": params}, x, method="logits")

    return logits


def changed_logits(params, row, model):
    """[changed position, position]: whether logits there depend on the token at the changed position."""
    length = len(row["tokens"]) - 1
    inputs = np.repeat(row["tokens"][None, :-1], length + 1, axis=0)
    for i in range(length):
        inputs[i, i] = 3 if inputs[i, i] != 3 else 4
    repeat = lambda name: np.repeat(row[name][None], length + 1, 0) if name in row else None  # noqa: E731
    logits = np.asarray(
        compiled_logits(model)(params, inputs, repeat("last_key"), repeat("documents"))
    )
    return np.abs(logits[:-1] - logits[-1:]).max(-1) > 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_no_leak(params, objective):
    """A position that is trained on never sees the token it predicts, nor a later one; prefixes are seen whole."""
    model = model_of()
    num_seen_ahead = 0
    for number, tokens in enumerate(windows_for(objective)):
        row = filling(objective, LENGTH) | objective.row(tokens, (0, number))
        depends = changed_logits(params, row, model)
        weights = row.get("token_weights", np.ones(LENGTH))
        last_key = row.get("last_key", np.arange(LENGTH))
        documents = row.get("documents", np.zeros(LENGTH))
        for position in range(LENGTH):
            on = np.flatnonzero(depends[:, position])
            assert on.max() == last_key[position]
            its = np.flatnonzero(documents == documents[position])
            assert set(on) == set(its[its <= last_key[position]])
            if weights[position]:
                assert on.max() == position
            num_seen_ahead += last_key[position] > position
    is_causal = objective == CausalLM() or not getattr(objective, "is_bidirectional", True)
    assert (num_seen_ahead > 0) != is_causal


# ---- loss, gradient, meshes, microbatches ----


def reference_loss(params, rows, row_weights, xp=np):
    """Weighted mean in float64, with the attention of reference_bloom opened to `last_key` and `documents`."""
    total = norm = 0.0
    for row, row_weight in zip(rows, row_weights, strict=True):
        length = len(row["tokens"]) - 1
        seen = np.arange(length)[None] <= row["last_key"][:, None]
        if "documents" in row:
            seen &= row["documents"][:, None] == row["documents"][None]
        z = reference_bloom.logits(params, xp.asarray(row["tokens"][None, :-1]), xp, seen)[0]
        z = z - z.max(-1, keepdims=True)
        nll = xp.log(xp.exp(z).sum(-1)) - z[np.arange(length), row["tokens"][1:]]
        total = total + (nll * row["token_weights"]).sum() * row_weight
        norm = norm + row["token_weights"].astype(np.float64).sum() * row_weight
    return total / norm


def batch_of(objective, num_rows, mesh, num_filled=0, seed=0):
    tokens = np.concatenate([windows_for(objective, 4, seed), windows_for(objective, 4, seed + 1)])
    tokens = {r: tokens[r % 8] for r in range(num_rows - num_filled)}
    keys = {row: (0, row) for row in tokens}
    rows = [objective.row(tokens[row], keys[row]) for row in tokens]
    return rows, put_batch(tokens, num_rows, LENGTH + 1, mesh, objective, keys)


TRAINED = [
    PrefixLM(document_end_id=END, reweight_by_position=True),
    *(pytest.param(each, marks=pytest.mark.slow) for each in (InputsTargets(True), SPANS)),
]  # fmt: skip


@pytest.mark.parametrize("objective", TRAINED, ids=repr)
def test_loss_and_gradient_are_float64s(params, mesh_of, objective):
    """On one device at once, and on eight in microbatches with rows that only fill."""
    document_end_id = getattr(objective, "document_end_id", None)
    model = model_of(document_end_id=document_end_id)
    expected = None
    for shape, num_microbatches, num_filled in [((1, 1, 1), 1, 2), ((2, 2, 2), 2, 2)]:
        mesh = mesh_of(*shape)
        rows, batch = batch_of(objective, 8, mesh, num_filled)
        if expected is None:
            if document_end_id is not None:
                for row in rows:
                    ends = row["tokens"][:-1] == END
                    row["documents"] = np.cumsum(ends) - ends
            with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
                run = jit(jax.value_and_grad(lambda p, r=rows: reference_loss(p, r, [1] * 6, jnp)))
                expected, expected_grads = run(reference_bloom.to_float64(params))
                expected = float(expected)
                expected_grads = jax.tree.map(np.asarray, expected_grads)
        with jax.set_mesh(mesh):
            step = jit(make_gradient(model, StepOptions()), static_argnums=(2, 3))
            loss, grads, parts = step(params, batch, None, num_microbatches)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())
    assert float(parts["part_samples"]) == 3  # rows 0, 2 and 4; 6 fills


def test_noise_of_a_part_is_that_of_its_own_mean(params, mesh_of):
    """part_norm is the norm of the weighted mean of the first microbatch's rows alone."""
    objective, mesh, model = PrefixLM(), mesh_of(1, 1, 1), model_of()
    _, batch = batch_of(objective, 8, mesh)
    first = jax.tree.map(lambda a: a[::2], batch)
    with jax.set_mesh(mesh):
        gradient = jit(make_gradient(model, StepOptions()), static_argnums=(2, 3))
        parts = gradient(params, batch, None, 2)[2]
        _, grads, _ = gradient(params, first, None, 1)
    norm = np.sqrt(
        sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    )
    assert float(parts["part_norm"]) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_evaluation_is_the_mean_over_targets(params, mesh_of, shape):
    """Not over rows, which have from one to all of their tokens as targets; as the loss of a step."""
    mesh, reference = mesh_of(*shape), reference_bloom.to_float64(params)
    rows, batch = batch_of(PrefixLM(), 8, mesh, num_filled=3)
    names = ["aa", "bb", "aa", "aa", "bb"]
    with jax.set_mesh(mesh):
        step = jit(make_eval_step(model_of(), StepOptions()))
        sums, weights = np.asarray(step(params, batch))
        found = held_out_losses(step, params, [(names[:3], batch), (names, batch)])
    num_targets = [row["token_weights"].sum() for row in rows]
    assert min(num_targets) < max(num_targets) / 2 and weights.tolist() == [*num_targets, 0, 0, 0]
    expected = [reference_loss(reference, [row], [1]) for row in rows]
    np.testing.assert_allclose(sums[:5] / weights[:5], expected, rtol=1e-5)
    twice = [*zip(names[:3], rows, strict=False), *zip(names, rows, strict=True)]
    for name, loss in found["loss_by_language"].items():
        its = [row for other, row in twice if other == name]
        assert loss == pytest.approx(reference_loss(reference, its, [1] * len(its)), rel=1e-5)
    every = reference_loss(reference, [row for _, row in twice], [1] * 8)
    assert found["validation_loss"] == pytest.approx(every, rel=1e-5)
    assert abs(np.mean([expected[i] for i in (0, 1, 2, *range(5))]) - every) > 1e-3


def test_without_weights_evaluation_is_the_mean_over_windows():
    losses = np.array([3.25, 4.5, 5.125, 9.0], np.float32)
    step = lambda params, batch: np.stack([losses * LENGTH, np.full(4, LENGTH, np.float32)])  # noqa: E731
    found = held_out_losses(step, None, [(["bb", "aa", "bb"], {})])
    assert found == {
        "loss_by_language": {"aa": 4.5, "bb": (3.25 + 5.125) / 2},
        "validation_loss": (3.25 + 4.5 + 5.125) / 3,
    }
    step = lambda params, batch: np.zeros((2, 4), np.float32)  # noqa: E731
    with pytest.raises(BadInput, match="no target in the held-out windows of: aa, bb"):
        held_out_losses(step, None, [(["bb", "aa"], {})])


def test_the_abstract_batch_is_like_a_batch(mesh_of):
    mesh = mesh_of(2, 2, 1)
    for objective in OBJECTIVES:
        _, batch = batch_of(objective, 8, mesh)
        like = abstract_batch(8, LENGTH, mesh, objective)
        assert {k: (v.shape, v.dtype, v.sharding) for k, v in batch.items()} == {
            k: (v.shape, v.dtype, v.sharding) for k, v in like.items()
        }


# ---- data and runs ----


def data_of(text, objective):
    return TrainData(store_dir=str(text.store_dir), sequence_length=16, seed=3, objective=objective)


def test_batches_do_not_depend_on_the_mesh(tiny_text, mesh_of):
    """Rows of a sample are made from its number: on any mesh, in any batch, with any beginning."""
    from bloomjax.schedules import BatchSchedule

    data = data_of(tiny_text, PrefixLM(seed=1)).open()
    schedule = BatchSchedule(8)
    found = []
    for shape, first in (((1, 1, 1), 1), ((4, 2, 1), 3)):
        batches = dict(data.batches(first, 4, schedule, mesh_of(*shape), lambda n: n))
        found.append({step: jax.tree.map(np.asarray, batches[step]) for step in (3, 4)})
    for step in (3, 4):
        assert found[0][step].keys() == {"tokens", "token_weights", "last_key", "weights"}
        for name, array in found[0][step].items():
            np.testing.assert_array_equal(array, found[1][step][name])
    samples = data.samples_of(3, schedule)
    for i, sample in enumerate(samples.tolist()):
        row = PrefixLM(seed=1).row(data.rows(samples[i : i + 1])[0], (0, sample))
        for name, array in row.items():
            np.testing.assert_array_equal(array, found[0][3][name][i])


def test_the_objective_belongs_to_a_run(tiny_text):
    plain, causal, prefix = (data_of(tiny_text, o).open().identity()
                             for o in (None, CausalLM(), PrefixLM(seed=1)))  # fmt: skip
    assert plain == causal and "objective" not in plain
    assert prefix == plain | {"objective": repr(PrefixLM(seed=1))} and identity(CausalLM()) == {}


@pytest.fixture(scope="module")
def straight(tiny_text, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("prefix") / "straight"
    arguments = dict(train_data=data_of(tiny_text, PrefixLM(seed=1)), train_steps=6)
    assert tiny_run.run(tiny_text, model_dir, eval_every_steps=3, **arguments) == 0
    return model_dir


@pytest.mark.slow
def test_a_resumed_run_equals_the_straight_one(tiny_text, straight, tmp_path, capsys):
    for steps in (3, 6):
        assert (
            tiny_run.run(
                tiny_text, tmp_path, train_steps=steps, eval_every_steps=3,
                train_data=data_of(tiny_text, PrefixLM(seed=1)),
            ) == 0
        )  # fmt: skip
    assert tiny_run.losses(tmp_path) == tiny_run.losses(straight)
    assert tiny_run.fingerprints(tmp_path, 6) == tiny_run.fingerprints(straight, 6)
    with pytest.raises(BadInput, match=re.escape("holds a run with other data: there objective=")):
        tiny_run.run(tiny_text, tmp_path, train_steps=7)
    assert tiny_run.run(tiny_text, tmp_path / "causal", train_steps=1) == 0
    assert tiny_run.losses(tmp_path / "causal")[1] != tiny_run.losses(straight)[1]


def test_the_overlay():
    bindings = ["include 'ablations/prefix_lm.gin'"]
    for file in ("tiny.gin", "560m.gin"):
        assert config.build("TrainData.objective", file, bindings) == PrefixLM(seed=42)
    assert config.build("train.train_data", "tiny.gin", bindings).objective == PrefixLM(seed=42)
    assert config.build("train.train_data", "tiny.gin").objective == CausalLM()


def test_the_other_overlays():
    span = config.build(
        "TrainData.objective", "560m.gin", ["include 'ablations/span_corruption.gin'"]
    )
    vocab_size = config.build("BloomConfig.vocab_size", "560m.gin")
    assert span == SpanCorruption(250_680, 200, seed=42) and span.num_ids() == vocab_size
    bindings = ["include 'ablations/inputs_targets.gin'", "TEXT_DIR = 'x'"]
    assert config.build("TrainData.objective", "560m.gin", bindings) == InputsTargets()
    assert config.build("prepare.pack_tokens", "560m.gin", bindings) == 2048


def test_a_model_without_rows_for_sentinels_is_refused(tiny_text):
    data = data_of(tiny_text, SpanCorruption(320, 8)).open()
    path = str(tiny_text.vocabulary.path)
    with pytest.raises(BadInput, match="needs 328 token ids, the embedding has only 320 rows"):
        open_matching_vocabulary(path, data, tiny_run.tiny_model())
    open_matching_vocabulary(path, data, tiny_run.tiny_model(vocab_size=328))
