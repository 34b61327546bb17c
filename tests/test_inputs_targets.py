"""Examples of inputs and targets from JSON lines to the loss."""

import json
import random

import numpy as np
import pytest
import tiny_run

from bloomjax import prepare as prepare_verb
from bloomjax.data import EvalData, TrainData
from bloomjax.errors import BadInput
from bloomjax.examples import Example
from bloomjax.objectives import CausalLM, InputsTargets
from bloomjax.schedules import BatchSchedule
from bloomjax.token_store import TokenStore, build_store, write_language, write_manifest
from bloomjax.vocabulary import SentencePieceVocabulary

LENGTH = 32


def some_examples(num=120, seed=0):
    """`bababa` asks for its end, thrice; of very different lengths."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choices("ba ke li mo nu".split(), k=rng.randint(1, 4))) for _ in range(num)
    ]
    return [Example(f"{w} {i}", f" {w[-2:]}" * rng.randint(1, 3)) for i, w in enumerate(words)]


def texts_of(vocab, rows):
    """(inputs, targets) of the examples of rows that an objective made, by what is trained on."""
    found = []
    for row in rows:
        for number in np.unique(row["documents"]):
            at = np.flatnonzero(row["documents"] == number)
            tokens = row["tokens"][at]
            if (tokens == vocab.pad_id).all():
                assert not row["token_weights"][at].any()
                continue
            # Position i predicts token i + 1, so the first target is the one after the first weight.
            weights = row["token_weights"][at]
            first = int(np.flatnonzero(weights)[0]) + 1
            assert weights.tolist() == [0] * (first - 1) + [1] * (len(at) - first) + [0]
            assert tokens[-1] == vocab.eos_id and vocab.bos_id not in tokens
            found.append(
                (vocab.decode(tokens[:first].tolist()), vocab.decode(tokens[first:].tolist()))
            )
    return found


@pytest.fixture(scope="module")
def vocab(tiny_text):
    return SentencePieceVocabulary(tiny_text.vocabulary.path)


def store_of(path, vocab, documents, pack_tokens=LENGTH):
    with build_store(path) as root:
        entry = write_language(root, "aa", documents, vocab, pack_tokens=pack_tokens)
        write_manifest(root, {"aa": entry}, vocab)
    return TokenStore(str(path))


def rows_of(store, split, length=LENGTH):
    windows = np.arange(store.num_windows("aa", split, length))
    tokens = store.read_windows("aa", split, windows, length)
    return [InputsTargets().row(row, ()) for row in tokens]


def test_every_example_is_in_a_window_once_and_whole(vocab, tmp_path):
    examples = some_examples()
    store = store_of(tmp_path / "store", vocab, examples)
    store.verify()
    for length in (LENGTH, 4 * LENGTH):
        found = [
            each
            for split in ("train", "validation")
            for each in texts_of(vocab, rows_of(store, split, length))
        ]
        expected = [(e.inputs, e.targets) for e in examples]
        if length == LENGTH:
            assert found == expected
        else:  # the rest of a split that fills no window is left out
            assert set(found) <= set(expected) and len(found) > 90
    num_tokens = sum(len(vocab.encode(e.inputs) + vocab.encode(e.targets)) + 1 for e in examples)
    num_used = sum((row["tokens"][:-1] != vocab.pad_id).sum() for row in rows_of(store, "train"))
    num_used += sum(
        (row["tokens"][:-1] != vocab.pad_id).sum() for row in rows_of(store, "validation")
    )
    assert num_used == num_tokens
    assert store.pack_tokens("aa") == LENGTH


def test_long_examples_lose_inputs_first(vocab, tmp_path):
    long_inputs = Example("ba " * 60, "ke")
    long_targets = Example("ba", "ke " * 60)
    store = store_of(tmp_path / "store", vocab, [long_inputs, long_targets, *some_examples(5)])
    row, other = rows_of(store, "train")[:2]
    target = [*vocab.encode("ke"), vocab.eos_id]
    inputs = vocab.encode(long_inputs.inputs)
    num = LENGTH - 1 - len(target)
    assert row["tokens"][: LENGTH - 1].tolist() == inputs[-num:] + target
    assert row["token_weights"].sum() == len(target)
    expected = vocab.encode(long_targets.targets)[: LENGTH - 2] + [vocab.eos_id]
    # Without inputs the first target has nothing to be predicted from.
    assert other["tokens"][: LENGTH - 1].tolist() == expected
    assert other["token_weights"].sum() == LENGTH - 2
    splits = store.manifest["languages"]["aa"]["splits"]
    assert splits["train"]["num_cut_documents"] == 2


def test_a_store_of_text_is_as_it_was(tiny_text):
    assert all(tiny_text.store.pack_tokens(name) is None for name in tiny_text.store.languages)


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    lines = [
        json.dumps({"inputs": e.inputs, "targets": e.targets, "x": 1}) for e in some_examples()
    ]
    (folder / "aa.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def prepare(examples_dir, tiny_text, store_dir, **changes):
    arguments = dict(
        task_module="bloomjax.tasks.inputs_targets", mixture_or_task_name="text_files",
        vocabulary_path=str(tiny_text.vocabulary.path), vocab_size=tiny_run.VOCAB_SIZE,
        store_dir=str(store_dir), text_dir=str(examples_dir), pack_tokens=LENGTH, num_workers=1,
    )  # fmt: skip
    prepare_verb.prepare(**(arguments | changes))


def test_prepare(text_dir, tiny_text, vocab, tmp_path, capsys):
    store_dir = tmp_path / "store"
    with pytest.raises(BadInput, match="need prepare.pack_tokens"):
        prepare(text_dir, tiny_text, store_dir, pack_tokens=None)
    prepare(text_dir, tiny_text, store_dir)
    same = store_of(tmp_path / "same", vocab, some_examples())
    store = TokenStore(str(store_dir))
    for split in ("train", "validation"):
        num = store.num_tokens("aa", split)
        np.testing.assert_array_equal(
            store.read("aa", split, 0, num), same.read("aa", split, 0, num)
        )
    capsys.readouterr()
    prepare(text_dir, tiny_text, store_dir)
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"pack_tokens \(32, now 64\)"):
        prepare(text_dir, tiny_text, store_dir, pack_tokens=64)
    with pytest.raises(BadInput, match="these are of text"):
        prepare(text_dir, tiny_text, tmp_path / "x", task_module="bloomjax.tasks.demo",
                mixture_or_task_name="demo", text_dir=None)  # fmt: skip


def test_through_seqio_they_are_the_same(text_dir):
    import dataclasses

    from bloomjax.task_text import find_languages

    [language] = find_languages("bloomjax.tasks.inputs_targets", "text_files", str(text_dir))
    assert language.has_targets and not language.through_seqio
    through = list(dataclasses.replace(language, through_seqio=True).documents_of_files())
    plain = list(language.documents_of_files())
    assert [(e.inputs, e.targets) for e in through] == [(e.inputs, e.targets) for e in plain]
    assert len(plain) == 120


def test_bad_examples_are_one_line(tmp_path):
    from bloomjax.tasks.documents import read_documents

    path = tmp_path / "a.jsonl"
    for line, error in [
        ({"inputs": "a"}, "has no text field 'targets'"),
        ({"inputs": "a", "targets": " "}, "the field 'targets' is blank"),
        ({"inputs": 1, "targets": "b"}, "the field 'inputs' is a number"),
    ]:
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(BadInput, match=error):
            list(read_documents(path, "inputs+targets"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadInput, match="from JSON lines"):
        list(read_documents(tmp_path / "a.txt", "inputs+targets"))


def test_the_right_objective_is_asked_for(tiny_text, vocab, tmp_path):
    store = store_of(tmp_path / "store", vocab, some_examples())

    def open_data(store_dir, objective, length=LENGTH):
        arguments = dict(sequence_length=length, seed=3, objective=objective)
        return TrainData(store_dir=str(store_dir), **arguments).open()

    with pytest.raises(BadInput, match=r"holds inputs and targets, not for CausalLM"):
        open_data(store.path, CausalLM())
    with pytest.raises(BadInput, match="holds text, not for InputsTargets"):
        open_data(tiny_text.store_dir, InputsTargets())
    with pytest.raises(BadInput, match="SEQUENCE_LENGTH is 48: no multiple of it"):
        open_data(store.path, InputsTargets(), 48)
    assert open_data(store.path, InputsTargets(), 64).sequence_length == 64


@pytest.mark.slow
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_a_run_learns_it_and_resumes(tiny_text, vocab, tmp_path, is_bidirectional):
    store = store_of(tmp_path / "store", vocab, some_examples(2000))
    data = lambda: TrainData(  # noqa: E731
        store_dir=str(store.path), sequence_length=LENGTH, seed=3,
        objective=InputsTargets(is_bidirectional),
    )  # fmt: skip
    batch = data().open().batch(1, BatchSchedule(8), tiny_run.FirstDevices(1).build(), lambda n: n)
    assert 0 < np.asarray(batch["token_weights"]).mean() < 0.6
    common = dict(eval_data=EvalData(max_windows_per_language=8), eval_every_steps=20)
    for model_dir, stops in ((tmp_path / "a", [20]), (tmp_path / "b", [10, 20])):
        for steps in stops:
            run = dict(train_data=data(), train_steps=steps) | common
            assert tiny_run.run(tiny_text, model_dir, **run) == 0
    assert tiny_run.losses(tmp_path / "a") == tiny_run.losses(tmp_path / "b")
    assert tiny_run.fingerprints(tmp_path / "a", 20) == tiny_run.fingerprints(tmp_path / "b", 20)
    first, *_, last = (r for r in tiny_run.records(tmp_path / "a") if "validation_loss" in r)
    assert last["validation_loss"] < first["validation_loss"] - 1
