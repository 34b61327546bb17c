"""From text files to the token store, through seqio. The only tests here that load TensorFlow."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bloomjax import task_text
from bloomjax.errors import BadInput
from bloomjax.prepare import import_seqio, prepare
from bloomjax.token_store import TokenStore
from bloomjax.vocabulary import ByteLevelBPEVocabulary, open_vocabulary

pytest.importorskip("seqio", reason="needs the extra `data`")

WORDS = "river boat quay spring water stone bridge road market garden winter letter".split()


def sentences(num_documents, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)) + f".\n  {number}" for number in range(num_documents)]


TEXT = {
    "en": sentences(40, 0),
    "fr": [f"Le fleuve était haut {number}.\n\n\tÀ demain" for number in range(21)],
    "code-c": [f"int f{n}() {{\n\treturn {n};\n}}\n" for n in range(3)],
}


@pytest.fixture
def text_dir(tmp_path):
    folder = tmp_path / "text"
    (folder / "code-c").mkdir(parents=True)
    (folder / "en.txt").write_text("\n\n".join(TEXT["en"]))
    lines = [text.replace("\n", "\\n").replace("\t", "\\t") for text in [*TEXT["fr"], "  "]]
    (folder / "fr.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    for number, code in enumerate(TEXT["code-c"]):
        (folder / "code-c" / f"{number}.c").write_text(code)
    return folder


@pytest.fixture
def arguments(tmp_path, text_dir):
    return {
        "task_module": "bloomjax.tasks.text_files",
        "mixture_or_task_name": "text_files",
        "text_dir": str(text_dir),
        "vocabulary_path": str(tmp_path / "vocabulary" / "small.model"),
        "vocab_size": 400,
        "store_dir": str(tmp_path / "store"),
    }


@pytest.fixture
def prepared(arguments):
    prepare(**arguments)
    return arguments


def snapshot(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_store_is_the_text(arguments, capsys):
    prepare(**arguments)
    store = TokenStore(arguments["store_dir"])
    store.verify()
    vocab = open_vocabulary(arguments["vocabulary_path"])
    assert store.languages == ("code-c", "en", "fr")
    assert store.vocabulary_fingerprint == vocab.fingerprint
    assert store.vocab_size == vocab.size == 400
    for language, texts in TEXT.items():
        num_held_out = max(1, round(0.05 * len(texts)))
        parts = {"train": texts[:-num_held_out], "validation": texts[-num_held_out:]}
        for split, part in parts.items():
            expected = [i for text in part for i in [*vocab.encode(text), 2]]
            tokens = store.read(language, split, 0, store.num_tokens(language, split))
            assert tokens.tolist() == expected
            documents = np.split(tokens, store.read_document_ends(language, split).astype(int))
            assert [vocab.decode(ids) for ids in documents[:-1]] == part
    entries = store.manifest["languages"]
    assert entries["fr"]["num_skipped_documents"] == 1
    assert [len(entries[name]["sources"]) for name in store.languages] == [3, 1, 1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["code-c", "en", "fr"]
    assert "3 languages, 64 documents" in lines[-1]
    assert not any("\r" in line for line in lines)


def test_vocabulary_does_not_see_what_is_held_out(arguments, text_dir):
    with open(text_dir / "en.txt", "a") as file:
        file.write("\n\nzzyzx " * 200)
    prepare(**{**arguments, "holdout_fraction": 0.9})
    model = open_vocabulary(arguments["vocabulary_path"])
    assert len(model.encode("zzyzx")) == 5


def test_json_is_trained_as_byte_level_bpe(arguments, capsys):
    path = arguments["vocabulary_path"].replace(".model", ".json")
    arguments |= {"vocabulary_path": path, "vocab_size": 380}
    prepare(**arguments)
    vocab = open_vocabulary(path)
    assert isinstance(vocab, ByteLevelBPEVocabulary) and vocab.size == 380
    store = TokenStore(arguments["store_dir"])
    assert store.vocabulary_fingerprint == vocab.fingerprint
    tokens = store.read("fr", "train", 0, store.num_tokens("fr", "train"))
    assert vocab.decode(tokens) == "".join(TEXT["fr"][:-1])
    prepare(**arguments)
    assert "is up to date, nothing to do" in capsys.readouterr().out.splitlines()[-1]


def test_nothing_to_do(prepared, tmp_path, text_dir, capsys):
    before = snapshot(tmp_path)
    capsys.readouterr()
    prepare(**{**prepared, "vocab_size": 512})  # a model with some ids more than the vocabulary
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "is up to date, nothing to do: 3 languages" in out
    text_dir.rename(tmp_path / "moved")  # the same files elsewhere
    prepare(**{**prepared, "text_dir": str(tmp_path / "moved")})
    assert sorted(value[0] for value in snapshot(tmp_path).values()) == sorted(
        value[0] for value in before.values()
    )


def test_other_stores_are_not_touched(prepared, tmp_path, text_dir):
    before = snapshot(tmp_path / "store")

    def refuse(message, **changes):
        with pytest.raises(BadInput, match=message):
            prepare(**{**prepared, **changes})
        assert snapshot(tmp_path / "store") == before

    refuse("the held-out fraction", holdout_fraction=0.2)
    refuse("has 400 tokens, VOCAB_SIZE is 399", vocab_size=399)
    refuse("has 400 tokens, VOCAB_SIZE is 1424", vocab_size=1424)
    refuse("there is no vocabulary", vocabulary_path=str(tmp_path / "missing.model"))
    (text_dir / "tum.txt").write_text("one\n\ntwo")
    refuse("made from something else: new: tum.")
    (text_dir / "tum.txt").unlink()
    (text_dir / "fr.jsonl").rename(tmp_path / "fr.jsonl")
    refuse("no longer there: fr")
    (tmp_path / "fr.jsonl").rename(text_dir / "fr.jsonl")
    (text_dir / "code-c" / "1.c").write_text("other")
    (text_dir / "en.txt").write_text((text_dir / "en.txt").read_text() + "x")
    refuse("something else: the text of code-c, en. Delete it or choose another STORE_DIR")


def test_same_text_same_store(prepared, tmp_path):
    again = {**prepared, "store_dir": str(tmp_path / "again")}
    again["vocabulary_path"] = str(tmp_path / "again.model")
    prepare(**again, num_workers=2)
    assert TokenStore(again["store_dir"]).manifest == TokenStore(prepared["store_dir"]).manifest


def test_bad_text_leaves_nothing(arguments, tmp_path, text_dir):
    with open(text_dir / "fr.jsonl", "a") as file:
        file.write('{"text": "cu')
    with pytest.raises(BadInput, match=r"fr\.jsonl line 23 is cut in the middle"):
        prepare(**arguments)
    with pytest.raises(
        BadInput, match="VOCAB_SIZE 260 is too small"
    ):  # found before the text is read
        prepare(**{**arguments, "vocab_size": 260})
    (text_dir / "fr.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(BadInput, match="needs 2 documents.*'fr' has 1 "):
        prepare(**arguments)
    assert list(tmp_path.iterdir()) == [text_dir]


def test_bad_arguments(arguments, tmp_path, text_dir):
    def refuse(message, **changes):
        with pytest.raises(BadInput, match=message):
            prepare(**{**arguments, **changes})
        assert list(tmp_path.iterdir()) == [text_dir]

    refuse("no task module bloomjax.tasks.missing", task_module="bloomjax.tasks.missing")
    refuse("needs the folder of your text", text_dir=None)
    refuse("there is no folder .*nowhere", text_dir=str(tmp_path / "nowhere"))
    refuse("registers no Mixture or Task 'other'; there are: ", mixture_or_task_name="other")
    refuse("must lie outside the folder of the text", store_dir=str(text_dir / "store"))
    refuse("held-out fraction", holdout_fraction=1.5)
    refuse("VOCAB_SIZE 9999 is too large", vocab_size=9999)
    refuse("does not read TEXT_DIR", task_module="bloomjax.tasks.demo")
    refuse(
        r"there is no vocabulary vocab\.txt; .* ends in \.model \(S.*\.json \(byte-level BPE\)",
        vocabulary_path="vocab.txt",
    )


def test_one_task_is_one_language(arguments):
    prepare(**{**arguments, "mixture_or_task_name": "text_files.code_c", "vocab_size": 280})
    assert TokenStore(arguments["store_dir"]).languages == ("code-c",)


def test_other_peoples_tasks(arguments, tmp_path):
    """A seqio Task that knows nothing of this package."""
    seqio = import_seqio()
    import tensorflow as tf

    feature = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.string, rank=0)

    def add(name, texts, feature_name="text"):
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                    {feature_name: texts}
                ),
                splits=["train", "test"],
            ),
            output_features={feature_name: feature},
        )

    def options(name):
        return {
            **arguments, "task_module": "bloomjax.tasks.languages", "text_dir": None,
            "mixture_or_task_name": name, "vocab_size": 290,
        }  # fmt: skip

    texts = ["first text é", " ", "second text", "third text"]
    add("theirs.xx", texts)
    prepare(**options("theirs.xx"))
    store = TokenStore(arguments["store_dir"])
    vocab = open_vocabulary(arguments["vocabulary_path"])
    assert store.languages == ("xx",)
    assert store.manifest["languages"]["xx"]["num_skipped_documents"] == 1
    tokens = store.read("xx", "train", 0, store.num_tokens("xx", "train"))
    assert vocab.decode(tokens) == "first text ésecond text"
    prepare(**options("theirs.xx"))
    add("theirs.xx", [*texts, "fourth"])
    with pytest.raises(BadInput, match="something else: the text of xx"):
        prepare(**options("theirs.xx"))
    add("theirs.bytes", [b"\xff", b"fine"])
    with pytest.raises(BadInput, match=r"theirs\.bytes has a document that is not UTF-8"):
        prepare(**{**options("theirs.bytes"), "store_dir": str(tmp_path / "2")})
    add("theirs.targets", ["a", "b"], "targets")
    with pytest.raises(BadInput, match="no feature 'text' of raw text; it has: targets"):
        prepare(**{**options("theirs.targets"), "store_dir": str(tmp_path / "2")})


def test_registered_tasks(text_dir, tmp_path):
    seqio = import_seqio()
    from bloomjax.tasks import demo, roots, text_files
    from bloomjax.tasks.languages import ROOTS_WEIGHTS

    text_files.register(text_dir)
    text_files.register(text_dir)  # again, in place of the first
    mixture = seqio.get_mixture_or_task("text_files")
    names = [task.name for task in seqio.get_subtasks(mixture)]
    assert names == ["text_files.code_c", "text_files.en", "text_files.fr"]
    task = seqio.get_mixture_or_task("text_files.en")
    dataset = task.get_dataset(sequence_length=None, split="train", shuffle=False)
    assert [x["text"].decode() for x in dataset.as_numpy_iterator()] == TEXT["en"]

    demo.register()
    assert len(seqio.get_subtasks(seqio.get_mixture_or_task("demo"))) == 59

    folder = tmp_path / "roots"
    folder.mkdir()
    for language in ("en", "tum", "zhs"):
        (folder / f"{language}.txt").write_text("one\n\ntwo")
    roots.register(folder)
    mixture = seqio.get_mixture_or_task("roots")
    for task in seqio.get_subtasks(mixture):
        assert mixture.get_rate(task) == ROOTS_WEIGHTS[task.name.removeprefix("roots.")]

    (text_dir / "code_c.txt").write_text("one\n\ntwo")
    with pytest.raises(BadInput, match=r"too alike: both are text_files\.code_c"):
        text_files.register(text_dir)


def test_changed_while_it_was_read(text_dir):
    """An error inside tf.data comes out as the line it began as."""
    seqio = import_seqio()
    from bloomjax import prepare as module
    from bloomjax.tasks import text_files

    text_files.register(text_dir)
    (text_dir / "en.txt").write_bytes(b"one\n\ntwo \xff\n")
    language = module.Language.of(seqio.get_mixture_or_task("text_files.en"))
    with pytest.raises(BadInput, match=r"^text_files\.en: \S*en\.txt is not UTF-8: line 3, byte"):
        list(language.documents())


def test_a_task_with_preprocessors_is_read_through_seqio(arguments, text_dir):
    """By a worker that finds it by its name; the files are recorded all the same."""
    import_seqio()
    from bloomjax.tasks import text_files

    text_files.register(text_dir)
    [language] = task_text.find_languages(
        "bloomjax.tasks.text_files", "text_files.fr", str(text_dir)
    )
    assert not language.through_seqio and len(language.files) == 1
    task = SimpleNamespace(
        name=language.task.name, source=language.task.source, preprocessors=[print]
    )
    assert task_text.Language.of(task).through_seqio
    text = ("bloomjax.tasks.text_files", "text_files", str(text_dir), "fr")
    assert list(task_text.read_task(*text)) == [*TEXT["fr"], "  "]


def test_languages_must_be_separate():
    def language(label, name, *files):
        return task_text.Language(label, SimpleNamespace(name=name), files)

    english, french = language("en", "a.en", "t/en.txt"), language("fr", "a.fr", "t/fr.txt")
    task_text._check_separate([english, french])
    with pytest.raises(BadInput, match=r"two Tasks are the language 'en': a\.en and b\.en"):
        task_text._check_separate([english, french, language("en", "b.en", "other.txt")])
    with pytest.raises(BadInput, match=r"two Tasks read the file \S+: a\.en and a\.code"):
        task_text._check_separate([english, french, language("code", "a.code", "t/../t/en.txt")])


@pytest.mark.parametrize("missing", ["tensorflow", "seqio"])
def test_missing_extra(arguments, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=rf"extra `data` \({missing} is .*'bloomjax\[data\]'"):
        prepare(**arguments)


PROGRAM = """
import dataclasses, os, time
from bloomjax import prepare
from bloomjax.tasks import text_files
read, find = text_files.read_documents, prepare.find_languages
def slow(path, *options):
    for text in read(path, *options):
        if str(path).endswith("en.txt"):
            time.sleep(0.001 * os.path.exists("small.model"))  # not while that is made
        yield text
text_files.read_documents = slow
prepare.find_languages = lambda *text: [
    dataclasses.replace(language, through_seqio=THROUGH_SEQIO) for language in find(*text)
]
prepare.prepare(
    task_module="bloomjax.tasks.text_files", mixture_or_task_name="text_files", text_dir="text",
    vocabulary_path="small.model", vocab_size=400, store_dir="store", num_workers=1,
)
"""


@pytest.mark.parametrize("through_seqio", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopping_it_neither_hangs_nor_leaves_a_store(text_dir, tmp_path, through_seqio):
    """tf.data with Python code behind it hangs at exit while an iterator is alive."""
    (text_dir / "en.txt").write_text("\n\n".join(sentences(4_000, 0)))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = PROGRAM.replace("THROUGH_SEQIO", str(through_seqio))
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tokenising 3 shards with 1 process"):
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    # Nothing before the traceback: TensorFlow is quiet.
    assert stderr.startswith("Traceback") and stderr.rstrip().endswith("KeyboardInterrupt")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("[s-]*/*"))
    # As large as any where nobody knows its size, so it comes first.
    finished = ["store.shards/code-c-00000-of-00001.tokens", "store.shards/lock"]
    assert left == (finished if through_seqio else [])
    assert not (tmp_path / "store").exists()
