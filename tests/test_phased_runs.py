"""Runs whose mixture changes on the way, and what a checkpoint says about the order of data."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from bloomjax.data import Phase, TrainData
from bloomjax.errors import BadInput
from bloomjax.schedules import BatchSchedule

ONE_LANGUAGE = {"bb": 1.0}


def train_data(text, **changes):
    options = dict(store_dir=str(text.store_dir), sequence_length=tiny_run.SEQUENCE_LENGTH, seed=3)
    return TrainData(**(options | changes))


def run(text, model_dir, num_steps, **changes):
    data = train_data(text, **changes)
    return tiny_run.run(text, model_dir, train_data=data, train_steps=num_steps)


def position(model_dir, step):
    path = model_dir / "checkpoints" / str(step) / "position" / "metadata"
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_phase_may_be_declared_later_and_only_for_what_is_to_come(tiny_text, tmp_path):
    """10 steps, then a phase for steps 11 to 20, stopped and resumed in it: as declared from the beginning."""
    phase = Phase(10 * tiny_run.BATCH_SIZE, weights=ONE_LANGUAGE)
    assert run(tiny_text, tmp_path / "a", 10) == 0
    assert "phases" not in position(tmp_path / "a", 10)["data"]
    assert run(tiny_text, tmp_path / "a", 20, phases=[phase]) == 0
    assert run(tiny_text, tmp_path / "b", 20, phases=[phase]) == 0
    assert tiny_run.losses(tmp_path / "a") == tiny_run.losses(tmp_path / "b")
    assert tiny_run.fingerprints(tmp_path / "a", 20) == tiny_run.fingerprints(tmp_path / "b", 20)
    assert run(tiny_text, tmp_path / "plain", 20) == 0
    a, plain = tiny_run.losses(tmp_path / "a"), tiny_run.losses(tmp_path / "plain")
    assert [s for s in a if a[s] != plain[s]] == list(range(11, 21))
    saved = position(tmp_path / "a", 20)["data"]["phases"]
    assert [(p["first_sample"], p["shares"]) for p in saved] == [(80, ONE_LANGUAGE)]
    # It has begun: it can neither go nor change.
    for phases in ([], [Phase(80, weights={"aa": 1.0})], [Phase(88, weights=ONE_LANGUAGE)]):
        with pytest.raises(BadInput, match="holds a run with other data: there phases="):
            run(tiny_text, tmp_path / "a", 30, phases=phases)
    assert run(tiny_text, tmp_path / "a", 22, phases=[phase, Phase(160, weights={"cc": 1.0})]) == 0


def test_longer_samples_from_another_store(tiny_text, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    documents = {name: texts[::-1] for name, texts in tiny_text.documents.items() if name != "cc"}
    from bloomjax import token_store

    token_store.write_store(folder / "anneal", documents, tiny_text.vocabulary)
    phase = Phase(80, sequence_length=8, store_dir=str(folder / "anneal"))
    assert run(tiny_text, tmp_path / "run", 20, phases=[phase]) == 0
    out = capsys.readouterr().out
    assert "from sample 80 (step 11): 2 sources, 8 tokens a sample" in out
    tokens = {r["step"]: r["tokens"] for r in tiny_run.records(tmp_path / "run")}
    assert tokens[10] == 80 * 16 and tokens[20] == 80 * 16 + 80 * 8
    data = train_data(tiny_text, phases=[phase]).open()
    assert data.mixture.names == ("aa", "bb", "cc", "aa@anneal", "bb@anneal")
    rows = data.rows(np.arange(80, 100))
    assert rows.shape == (20, 9)
    source, _, window = data.mixture.locate(np.arange(80, 100))
    for row, number, w in zip(rows, source, window, strict=True):
        store, language = data.sources[data.mixture.names[number]]
        assert Path(store.path).name == "anneal"
        np.testing.assert_array_equal(row, store.read(language, "train", w * 8, w * 8 + 9))
    saved = position(tmp_path / "run", 20)["data"]["phases"]
    assert saved[0]["sequence_length"] == 8 and len(saved[0]["stores"]) == 1


def test_a_length_changes_between_steps_only(tiny_text, tmp_path):
    with pytest.raises(BadInput, match="in the middle of step 11; begin it at sample 80 or 88"):
        run(tiny_text, tmp_path / "run", 20, phases=[Phase(83, sequence_length=8)])
    with pytest.raises(BadInput, match="sequence_length 12, which does not divide block_tokens 16"):
        run(tiny_text, tmp_path / "run", 20, phases=[Phase(80, sequence_length=12)])
    data = train_data(tiny_text, phases=[Phase(80, sequence_length=32)], block_tokens=32).open()
    ramp = BatchSchedule(8)
    (line,) = data.check_phases(ramp, 20)
    assert line.startswith("from sample 80 (step 11): 3 sources, 32 tokens a sample")
    assert data.rows(np.arange(80, 84)).shape == (4, 33)


def test_the_chain_is_saved_and_checked(tiny_text, tmp_path, monkeypatch):
    assert run(tiny_text, tmp_path / "run", 20) == 0
    mixture = train_data(tiny_text).open().mixture
    chains = [position(tmp_path / "run", step)["chain"] for step in (10, 20)]
    expected = [mixture.chain(0, 0, num) for num in (80, 160)]
    assert chains == [[[0, 0], [80, expected[0]]], [[80, expected[0]], [160, expected[1]]]]
    # A program that deals samples in another order, under the same configuration.
    from bloomjax import phases

    monkeypatch.setattr(phases, "permute", lambda index, size, key: (index + 1) % size)
    with pytest.raises(BadInput, match="trained on other samples between 80 and 160 than this"):
        run(tiny_text, tmp_path / "run", 30)
    monkeypatch.undo()
    assert run(tiny_text, tmp_path / "run", 22) == 0


@pytest.mark.slow
def test_another_mesh_and_batch_leave_the_chain_alone(tiny_text, tmp_path):
    """The same 160 samples in batches of 8 on one device and of 16 on eight."""
    assert run(tiny_text, tmp_path / "one", 20) == 0
    assert tiny_run.run(
        tiny_text, tmp_path / "eight", train_data=train_data(tiny_text), train_steps=10,
        batch_schedule=BatchSchedule(16), mesh=tiny_run.FirstDevices(4, 2, 1, num=8),
    ) == 0  # fmt: skip
    one, eight = position(tmp_path / "one", 20), position(tmp_path / "eight", 10)
    assert one["chain"][1] == eight["chain"][1] and one["samples"] == eight["samples"] == 160
    assert len(jax.devices()) == 8


def test_stores_with_one_folder_name_are_several_sources(tiny_text, tmp_path):
    from bloomjax import token_store

    phases = []
    for number, name in enumerate("xy", 1):
        (tmp_path / name).mkdir()
        documents = {"aa": tiny_text.documents["aa"][number:]}
        token_store.write_store(tmp_path / name / "tokens", documents, tiny_text.vocabulary)
        phases.append(Phase(100 * number, store_dir=str(tmp_path / name / "tokens")))
    data = train_data(tiny_text, phases=phases).open()
    assert data.mixture.names == ("aa", "bb", "cc", "aa@tokens", "aa@tokens.2")
    assert [Path(store.path).parent.name for store, _ in data.sources.values()][3:] == ["x", "y"]


def test_a_phase_within_a_step_and_one_with_nothing_to_heat(tiny_text):
    data = train_data(tiny_text, phases=[Phase(83, weights=ONE_LANGUAGE)]).open()
    (line,) = data.check_phases(BatchSchedule(8), 20)
    assert line.startswith("from sample 83 (step 11): 1 sources")
    with pytest.raises(
        BadInput, match="sample 83 has a temperature but neither weights nor a store"
    ):
        train_data(tiny_text, phases=[Phase(83, temperature=2.0)]).open()
