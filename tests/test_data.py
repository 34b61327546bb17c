import functools
import types

import jax
import numpy as np
import pytest
from tiny_run import Text

from bloomjax import data as data_module
from bloomjax import token_store
from bloomjax.data import EvalData, TrainData, check_filled_shares, filled_rows, host_rows
from bloomjax.errors import BadInput
from bloomjax.schedules import BatchSchedule

LENGTH = 16


def train_data(text, **changes):
    return TrainData(
        **(dict(store_dir=str(text.store_dir), sequence_length=LENGTH, seed=3) | changes)
    )


def real_rows(batch):
    """Tokens of the rows that count, in order; checks the others."""
    tokens, weights = np.asarray(batch["tokens"]), np.asarray(batch["weights"])
    assert tokens.dtype == np.int32 and weights.dtype == np.float32
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert not tokens[weights == 0].any()
    return tokens[weights == 1]


def multiples_of(multiple):
    return functools.partial(filled_rows, multiple=multiple)


def stream(data, schedule, mesh, first_step, last_step, multiple=8):
    """Tokens of all samples of these steps, in order."""
    batches = data.batches(first_step, last_step, schedule, mesh, multiples_of(multiple))
    return np.concatenate([real_rows(batch) for _, batch in batches])


def test_rows_are_what_the_store_holds(tiny_text):
    data = train_data(tiny_text).open()
    samples = np.concatenate([np.arange(1500), [10**6, 2 * 10**8]])
    rows = data.rows(samples)
    source, _, window = data.mixture.locate(samples)
    assert rows.shape == (len(samples), LENGTH + 1) and rows.dtype == np.int32
    for row, s, w in zip(rows, source, window, strict=True):
        direct = tiny_text.store.read(
            data.mixture.names[s], "train", w * LENGTH, w * LENGTH + LENGTH + 1
        )
        np.testing.assert_array_equal(row, direct)
    # An epoch of a language is its whole text, but for the rest that fills no window.
    for number, name in enumerate(data.mixture.names):
        num = tiny_text.store.num_windows(name, "train", LENGTH)
        epoch = rows[source == number][:num]
        assert len(epoch) == num
        text = epoch[np.argsort(window[source == number][:num])][:, :-1].reshape(-1)
        np.testing.assert_array_equal(text, tiny_text.store.read(name, "train", 0, num * LENGTH))


def test_held_out_text_is_never_trained_on(tiny_text):
    train = {tuple(row[1:]) for row in train_data(tiny_text).open().rows(np.arange(3000)).tolist()}
    held_out = EvalData(max_windows_per_language=1000, batch_size_samples=8)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)  # fmt: skip
    batches = held_out.batches(train_data(tiny_text).open(), mesh)
    rows = [tuple(row[1:]) for _, batch in batches for row in real_rows(batch).tolist()]
    assert len(rows) > 20 and not train & set(rows)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 1, 4)])
def test_batches_are_the_same_on_every_mesh(tiny_text, mesh_of, shape):
    data = train_data(tiny_text).open()
    schedule = BatchSchedule(12)
    mesh = mesh_of(*shape)
    expected = data.rows(np.arange(5 * 12))
    np.testing.assert_array_equal(stream(data, schedule, mesh, 1, 5), expected)
    batch = data.batch(2, schedule, mesh, multiples_of(8))
    assert batch["tokens"].shape == (16, LENGTH + 1) and batch["weights"].shape == (16,)
    shard_rows = 16 // (shape[0] * shape[1])
    for shard in batch["tokens"].addressable_shards:
        assert shard.data.shape == (shard_rows, LENGTH + 1)
        np.testing.assert_array_equal(shard.data, np.asarray(batch["tokens"])[shard.index])
    np.testing.assert_array_equal(np.asarray(batch["weights"]), [1.0] * 12 + [0.0] * 4)


def test_a_ramp_resumed_anywhere_gives_the_same_samples(tiny_text, mesh_of):
    data = train_data(tiny_text).open()
    ramp, constant = BatchSchedule(20, 4, 4, 200), BatchSchedule(4)
    num_samples = ramp.samples_after(25)
    expected = data.rows(np.arange(num_samples))
    meshes = [mesh_of(*shape) for shape in ((1, 1, 1), (8, 1, 1), (2, 4, 1), (4, 2, 1))]
    rng = np.random.default_rng(0)
    for _ in range(4):
        # Stopped at random steps; each piece on another mesh and filled to another multiple.
        cuts = [0, *sorted(rng.choice(np.arange(1, 25), 3, replace=False).tolist()), 25]
        pieces = [
            stream(data, ramp, meshes[i], first + 1, last, multiple=8 * (1 + i % 2))
            for i, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
    # A schedule that has consumed as many samples after other steps goes on with the same ones.
    step = next(s for s in range(5, 25) if ramp.samples_after(s) % 4 == 0)
    first_step = ramp.samples_after(step) // 4 + 1
    after = stream(data, constant, meshes[1], first_step, first_step + 5)
    np.testing.assert_array_equal(after, data.rows(ramp.samples_after(step) + np.arange(24)))


def test_batches_read_ahead_in_order_and_pass_errors_on(tiny_text, mesh_of, monkeypatch):
    data = train_data(tiny_text, num_prefetched=3).open()
    mesh, schedule = mesh_of(1, 1, 1), BatchSchedule(4)
    assert [step for step, _ in data.batches(7, 12, schedule, mesh, multiples_of(1))] == list(
        range(7, 13)
    )
    assert list(data.batches(5, 4, schedule, mesh, multiples_of(1))) == []
    batches = data.batches(1, 10**9, schedule, mesh, multiples_of(1))
    next(batches)
    batches.close()  # does not wait for the rest
    whole = data.batch

    def broken(step, *args):
        if step == 3:
            raise BadInput("a chunk is damaged")
        return whole(step, *args)

    monkeypatch.setattr(data, "batch", broken)
    batches = data.batches(1, 10, schedule, mesh, multiples_of(1))
    assert [next(batches)[0], next(batches)[0]] == [1, 2]
    with pytest.raises(BadInput, match="a chunk is damaged"):
        next(batches)


def test_host_rows(mesh_of, monkeypatch):
    mesh = mesh_of(2, 4, 1)
    np.testing.assert_array_equal(host_rows(16, mesh), np.arange(16))

    def of_second_host(mesh, spec):
        # 4 of 8 devices; two of them hold the same rows, as with a tensor axis.
        slices = {0: slice(8, 10), 1: slice(8, 10), 2: slice(12, 14), 3: slice(4, 6)}
        indices = {device: (rows,) for device, rows in slices.items()}
        return types.SimpleNamespace(addressable_devices_indices_map=lambda shape: indices)

    monkeypatch.setattr(data_module, "NamedSharding", of_second_host)
    np.testing.assert_array_equal(host_rows(16, mesh), [4, 5, 8, 9, 12, 13])


def test_each_host_reads_only_its_rows(tiny_text, mesh_of, monkeypatch):
    data = train_data(tiny_text).open()
    asked = []
    rows = data.rows
    monkeypatch.setattr(data, "rows", lambda samples: asked.append(samples) or rows(samples))
    monkeypatch.setattr(data_module, "host_rows", lambda num_rows, mesh: np.array([1, 2, 13]))
    batch = data.batch(3, BatchSchedule(12), mesh_of(1, 1, 1), multiples_of(16))
    np.testing.assert_array_equal(asked[0], [25, 26])  # row 13 only fills
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(batch["weights"])), [1, 2])
    np.testing.assert_array_equal(real_rows(batch), rows(np.array([25, 26])))


# ---- filling ----


def test_filled_rows():
    assert [filled_rows(n, 8) for n in (1, 7, 8, 9, 2048)] == [8, 8, 8, 16, 2048]
    assert filled_rows(2048, 384) == 2304
    assert filled_rows(2048, 48) == 2064


def test_filled_shares_are_said_for_each_stage():
    schedule = BatchSchedule(20, 4, 4, 100)
    lines = check_filled_shares(schedule, 10**6, multiples_of(8), 0.5)
    first = {stage.batch_size_samples: stage.first_step for stage in schedule.stages()}
    assert lines == [
        f"from step {first[4]}: batch 4 runs as 8 rows, 50.0% of them with weight 0",
        f"from step {first[12]}: batch 12 runs as 16 rows, 25.0% of them with weight 0",
        f"from step {first[20]}: batch 20 runs as 24 rows, 16.7% of them with weight 0",
    ]
    assert check_filled_shares(schedule, first[12] - 1, multiples_of(8), 0.5) == lines[:1]
    assert check_filled_shares(BatchSchedule(32), 100, multiples_of(8), 0.0) == []


def test_too_much_filling_is_refused_with_the_limit_that_would_do():
    schedule = BatchSchedule(20, 4, 4, 100)
    with pytest.raises(BadInput) as error:
        check_filled_shares(schedule, 10**6, multiples_of(12), 0.5)
    assert "a batch of 4 samples (from step 1 on) fills only 33% of the 12 rows" in str(error.value)
    limit = float(str(error.value).rsplit("max_filled_share=", 1)[1])
    assert check_filled_shares(schedule, 10**6, multiples_of(12), limit)


# ---- shares ----


def test_weights_from_the_store_by_default(tiny_text):
    data = train_data(tiny_text).open()
    tokens = {name: tiny_text.store.num_tokens(name, "train") for name in ("aa", "bb", "cc")}
    assert data.mixture.shares == pytest.approx(
        {name: num / sum(tokens.values()) for name, num in tokens.items()}
    )


def test_weights_as_dict_module_and_temperature(tiny_text, monkeypatch):
    weights = {"cc": 1.0, "aa": 4.0}
    data = train_data(tiny_text, weights=weights).open()
    assert data.mixture.shares == pytest.approx({"aa": 0.8, "cc": 0.2})
    module = types.ModuleType("rates_of_a_test")
    module.RATES = weights
    module.NUMBER = 3.0
    monkeypatch.setitem(__import__("sys").modules, "rates_of_a_test", module)
    by_name = train_data(tiny_text, weights="rates_of_a_test:RATES").open()
    assert by_name.identity() == data.identity()
    warm = train_data(tiny_text, weights=weights, temperature=2.0).open()
    assert warm.mixture.shares == pytest.approx({"aa": 2 / 3, "cc": 1 / 3})


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"aa": 1.0, "xx": 1.0, "yy": 2.0}, "names xx, yy, which the store .* it has aa, bb, cc"),
        (
            "bloomjax.tasks.languages:ROOTS_WEIGHTS",
            "has no language of .*WEIGHTS; it has aa, bb, cc",
        ),
        ("bloomjax.tasks.languages:RATES", "is not 'module:NAME' of a dict: .*RATES"),
        (
            "no_such_module:RATES",
            "is not 'module:NAME' of a dict: No module named 'no_such_module'",
        ),
        ("RATES", "is not 'module:NAME' of a dict"),
        (":RATES", "is not 'module:NAME' of a dict"),
        ("bloomjax.tasks.languages:CODE_WEIGHT", "is not a dict but a float"),
        ({"aa": 1.0, "bb": 0.0}, "each weight must be a positive number: 'bb' has 0.0"),
        ({"aa": 1.0, "bb": -1.0}, "each weight must be a positive number: 'bb' has -1.0"),
        (
            {"aa": -1.0, "bb": -1.0},
            "each weight must be a positive number: 'aa' has -1.0, 'bb' has -1.0",
        ),
        ({"aa": float("nan"), "bb": 1.0}, "each weight must be a positive number: 'aa' has nan"),
        ({}, "there is no weight"),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bad_weights(tiny_text, weights, message, temperature):
    with pytest.raises(BadInput, match=message) as error:
        train_data(tiny_text, weights=weights, temperature=temperature).open()
    assert "\n" not in str(error.value)


def test_a_language_too_short_for_a_window_is_named(tiny_text):
    longest = max(tiny_text.store.num_tokens(name, "train") for name in ("aa", "bb", "cc"))
    shorter = [n for n in ("aa", "bb", "cc") if tiny_text.store.num_tokens(n, "train") < longest]
    with pytest.raises(BadInput, match=f"no training window in: {', '.join(shorter)} "):
        train_data(tiny_text, sequence_length=longest - 1).open()


def test_a_missing_store_is_named(tiny_text):
    with pytest.raises(BadInput, match="no token store .*/nowhere"):
        train_data(tiny_text, store_dir=str(tiny_text.folder / "nowhere")).open()


def test_identity_changes_with_all_that_decides_the_samples(tiny_text, tmp_path):
    base = train_data(tiny_text).open().identity()
    assert train_data(tiny_text).open().identity() == base
    other_text = Text(tmp_path, seed=1)
    for changes in (
        {"seed": 4},
        {"weights": {"aa": 1.0, "bb": 1.0, "cc": 1.0}},
        {"temperature": 1.5},
        {"sequence_length": 17},
        {"store_dir": str(other_text.store_dir)},
    ):
        assert train_data(tiny_text, **changes).open().identity() != base, changes
    # A copy of the store elsewhere is the same text.
    copy = token_store.write_store(tmp_path / "copy", tiny_text.documents, tiny_text.vocabulary)
    assert train_data(tiny_text, store_dir=copy.path).open().identity() == base
    assert train_data(tiny_text, num_prefetched=5, max_filled_share=0.1).open().identity() == base


# ---- held-out text ----


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)])
def test_eval_batches(tiny_text, mesh_of, shape):
    data = train_data(tiny_text).open()
    batches = list(
        EvalData(max_windows_per_language=3, batch_size_samples=5).batches(data, mesh_of(*shape))
    )
    num_rows = 5 if shape == (1, 1, 1) else 8
    languages = [language for names, _ in batches for language in names]
    assert languages == ["aa"] * 3 + ["bb"] * 3 + ["cc"] * 3
    for names, batch in batches:
        assert batch["tokens"].shape == (num_rows, LENGTH + 1)
        np.testing.assert_array_equal(
            np.asarray(batch["weights"]), [1.0] * len(names) + [0.0] * (num_rows - len(names))
        )
    rows = np.concatenate([real_rows(batch) for _, batch in batches])
    for first, name in zip((0, 3, 6), ("aa", "bb", "cc"), strict=True):
        windows = tiny_text.store.read_windows(name, "validation", np.arange(3), LENGTH)
        np.testing.assert_array_equal(rows[first : first + 3], windows)


def test_eval_takes_what_there_is_and_names_languages_without_any(tiny_text, mesh_of):
    store = tiny_text.store
    num_tokens = {name: store.num_tokens(name, "validation") for name in ("aa", "bb", "cc")}
    data = train_data(tiny_text).open()
    everything = list(EvalData(max_windows_per_language=10**6).batches(data, mesh_of(1, 1, 1)))
    assert sum(len(names) for names, _ in everything) == sum(
        (n - 1) // LENGTH for n in num_tokens.values()
    )
    longest = max(num_tokens.values())
    without = [name for name in num_tokens if num_tokens[name] < longest]
    data = train_data(tiny_text, sequence_length=longest - 1).open()
    with pytest.raises(BadInput) as error:
        list(EvalData().batches(data, mesh_of(1, 1, 1)))
    assert f"no held-out window of {longest - 1} tokens in: {', '.join(without)} (store" in str(
        error.value
    )
