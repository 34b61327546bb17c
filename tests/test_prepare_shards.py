"""Shards, the process pool, the array and Beam: whichever way, the same bytes, and nothing done twice."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from bloomjax import prepare, prepare_beam, prepare_pool, prepare_shards, token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.prepare_shards import Shard, plan, tokenise_shard
from bloomjax.task_text import Language
from bloomjax.tasks import text_files
from bloomjax.token_store import TokenStore

REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS = REPOSITORY / "tasks" / "demo_corpus"
# Without TensorFlow, whose start would take most of the time.
PROGRAM = """
import json, sys
from bloomjax import prepare
from bloomjax.task_text import Language
from bloomjax.tasks import text_files
prepare.find_languages = lambda module, name, text_dir: [
    Language(label, None, tuple(map(str, files)), "text", False)
    for label, files in text_files.find_languages(text_dir).items()
]
try:
    prepare.prepare(**json.loads(sys.argv[1]))
except prepare.BadInput as error:
    sys.exit(f"bloomjax: {error}")
"""


def demo_files():
    found = text_files.find_languages(CORPUS)
    del found["code"]
    code = text_files.find_languages(CORPUS / "code")
    return found | {f"code-{name}": files for name, files in code.items()}


def languages_of(files):
    return [
        Language(label, None, tuple(map(str, paths)), "text", False)
        for label, paths in files.items()
    ]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    texts = [
        t for paths in demo_files().values() for p in paths for t in text_files.read_documents(p)
    ]
    return {
        suffix: train(texts, folder / f"v{suffix}", 3000)
        for suffix, train in vocabulary.TRAINERS.items()
    }


def sentence(rng, num_words):
    return "".join(map(chr, rng.integers(0x61, 0x250, num_words))) + " é 中文 " * (num_words // 9)


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    """One large file of each kind, many small ones, and documents of nothing but whitespace."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    documents = [f"{n}\n {sentence(rng, int(rng.integers(1, 90)))}" for n in range(300)]
    (folder / "en.txt").write_text("\n\n".join(documents))
    lines = [json.dumps({"text": text if n % 50 else " \n"}) for n, text in enumerate(documents)]
    (folder / "fr.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "code").mkdir()
    for number, text in enumerate(documents[:40]):
        (folder / "code" / f"{number:02}.py").write_text(text)
    return folder


@pytest.fixture
def arguments(text_dir, vocabularies, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare,
        "find_languages",
        lambda module, name, text_dir: languages_of(text_files.find_languages(text_dir)),
    )
    return {
        "task_module": "",
        "mixture_or_task_name": "",
        "text_dir": str(text_dir),
        "vocabulary_path": str(vocabularies[".model"].path),
        "vocab_size": 3000,
        "store_dir": str(tmp_path / "store"),
        "shard_bytes": 3000,
    }


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(text_dir, vocabularies, tmp_path_factory):
    """The arrays, without any of the modules under test but `token_store`, and the manifest of one process."""
    texts = {
        label: [text for path in paths for text in text_files.read_documents(path)]
        for label, paths in text_files.find_languages(text_dir).items()
    }
    folder = tmp_path_factory.mktemp("expected")
    token_store.write_store(folder / "store", texts, vocabularies[".model"])
    return contents(folder / "store")


def assert_expected(store_dir, expected, text_dir):
    found = contents(store_dir)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == ["manifest.json"]
    manifest, other = (json.loads(each["manifest.json"]) for each in (found, expected))
    for label, entry in manifest["languages"].items():
        assert entry["splits"] == other["languages"][label]["splits"]
        files = text_files.find_languages(text_dir)[label]
        sources = [token_store.SourceFile.of(path) for path in files]
        assert [token_store.SourceFile(**each) for each in entry["sources"]] == sources
    assert manifest["languages"]["fr"]["num_skipped_documents"] == 6
    TokenStore(store_dir).verify()
    return found["manifest.json"]


# --- One shard -----------------------------------------------------------------------------------

MARK = "\ufeff"
TRICKY = {
    "a.txt": f"{MARK}one\n\n{MARK}two\r\nlines\r\n\r\n{MARK}\n\n \n\nthree\n\u3000\nfour\n\n\n\n{MARK}five",
    "b.jsonl": f'{MARK}{{"text": "one"}}\n\n{{"text": " "}}\r\n{{"text": "tw\\no\u00e9"}}\n{{"text": "3"}}',
    "c.txt": "no end at all\nof this document\n \nbut one",
    "d.jsonl": '{"text": "alone"}',
    "e.txt": "\n\n\n\n",
    "f.txt": "",
}


@pytest.mark.parametrize("name", TRICKY)
def test_the_parts_of_a_file_are_the_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TRICKY[name].encode())
    whole = list(text_files.read_documents(path))
    num_bytes = path.stat().st_size
    most = 0
    for shard_bytes in range(1, num_bytes + 2):
        shards = plan("xx", [str(path)], "text", shard_bytes)
        assert sum(shard.num_bytes for shard in shards) == num_bytes
        parts = [list(prepare_shards._documents(shard, str(tmp_path))) for shard in shards]
        assert [text for part in parts for text in part] == whole
        most = max(most, sum(map(bool, parts)))
    assert most == {"a.txt": 3, "b.jsonl": 4}.get(name, min(1, len(whole)))
    assert os.listdir(tmp_path) == [name]


def test_plan(tmp_path):
    sizes = {"a.py": 40, "b.py": 50, "c.py": 30, "d.py": 500, "e.txt": 301, "f.txt": 99, "g.txt": 1}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    shards = plan("xx", [str(tmp_path / name) for name in sizes], "text", 100)
    found = [([Path(f).name for f in s.files], s.part, s.num_bytes) for s in shards]
    parts = [(0, 75), (75, 150), (150, 225), (225, 301)]
    assert found == [
        (["a.py", "b.py"], None, 90), (["c.py"], None, 30), (["d.py"], None, 500),
        *((["e.txt"], part, part[1] - part[0]) for part in parts), (["f.txt", "g.txt"], None, 100),
    ]  # fmt: skip
    assert shards[3].name == "xx-00003-of-00008"
    with pytest.raises(BadInput, match="cannot read .*missing.txt: No such file"):
        plan("xx", [str(tmp_path / "missing.txt")], "text")


def test_an_error_in_a_part_is_named_as_in_the_file(tmp_path, vocabularies):
    path = tmp_path / "xx.jsonl"
    path.write_text('{"text": "one"}\n' * 50 + "{}\n" + '{"text": "one"}\n' * 9)
    shards = plan("xx", [str(path)], "text", 100)
    errors = []
    for shard in shards:
        try:
            make(shard, tmp_path / "shards", vocabularies[".model"])
        except BadInput as error:
            errors.append(str(error))
    assert errors == [f"{path} line 51 has no text field 'text'; it has: none"]
    assert len(os.listdir(tmp_path / "shards")) == len(shards) - 1


def make(shard, folder, vocab):
    return tokenise_shard(
        shard, folder=str(folder), vocabulary_path=str(vocab.path), fingerprint=vocab.fingerprint
    )


def test_a_finished_shard_is_kept_until_something_changes(tmp_path, vocabularies):
    path = tmp_path / "xx.txt"
    path.write_text("one\n\ntwo\n\nthree")
    [shard] = plan("xx", [str(path)], "text")
    folder, vocab = tmp_path / "shards", vocabularies[".model"]
    assert make(shard, folder, vocab)
    [file] = folder.iterdir()
    whole, inode = file.read_bytes(), file.stat().st_ino
    assert not make(shard, folder, vocab) and file.stat().st_ino == inode
    assert prepare_shards.is_finished(str(folder), shard, vocab.fingerprint)
    # Another vocabulary, the same number of bytes of another text, another place in the plan.
    assert not prepare_shards.is_finished(str(folder), shard, vocabularies[".json"].fingerprint)
    assert make(shard, folder, vocabularies[".json"]) and make(shard, folder, vocab)
    path.write_text("one\n\ntwo\n\nTHREE")
    assert make(shard, folder, vocab) and file.read_bytes() != whole
    path.write_text("one\n\ntwo\n\nthree")
    assert make(shard, folder, vocab) and file.read_bytes() == whole
    # Any flipped bit, any length.
    for position in range(0, len(whole), 7):
        bit = 1 << position % 8
        file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        assert make(shard, folder, vocab), position
        assert file.read_bytes() == whole
    for length in range(0, len(whole), 11):
        file.write_bytes(whole[:length])
        assert prepare_shards.read_header(str(folder), shard) is None
    assert make(shard, folder, vocab) and file.read_bytes() == whole


def test_text_that_changes_while_it_is_read(tmp_path, vocabularies, monkeypatch):
    path = tmp_path / "xx.txt"
    path.write_text("one\n\ntwo")

    def read(path, *_):
        yield "one"
        Path(path).write_text("something else")

    monkeypatch.setattr(text_files, "read_documents", read)
    [shard] = plan("xx", [str(path)], "text")
    with pytest.raises(BadInput, match="the text of 'xx' changed while it was read"):
        make(shard, tmp_path, vocabularies[".model"])
    assert os.listdir(tmp_path) == ["xx.txt"]


def test_a_task_without_files(tmp_path, vocabularies):
    texts = ["one", " ", "two"]
    shard = Shard("xx", 0, 1, read=lambda: iter(texts))
    assert make(shard, tmp_path, vocabularies[".model"])
    assert not make(shard, tmp_path, vocabularies[".model"])
    header = prepare_shards.read_header(str(tmp_path), shard)
    assert header is not None
    assert (header["num_documents"], header["num_skipped_documents"]) == (2, 1)
    source = prepare_shards.source_of_task("xx", (text for text in texts))
    assert header["inputs"] == [
        {"path": "Task xx", "num_bytes": source.num_bytes, "sha256": source.sha256}
    ]
    texts[0] = "onf"
    assert make(shard, tmp_path, vocabularies[".model"])
    texts[:2] = ["onf ", ""]  # as many bytes
    assert make(shard, tmp_path, vocabularies[".model"])


def test_a_disk_that_is_full(tmp_path, vocabularies):
    (tmp_path / "xx.txt").write_text("word " * 20_000)
    [shard] = plan("xx", [str(tmp_path / "xx.txt")], "text")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(BadInput, match=r"^cannot write .*xx-00000-of-00001.tokens: File too l"):
            make(shard, tmp_path / "shards", vocabularies[".model"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path / "shards")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot write .*: (Not a directory|File exists)"):
        make(shard, tmp_path / "file", vocabularies[".model"])


def test_bad_documents_are_left_out_and_counted(arguments, vocabularies, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    lines = ['{"text": "one"}', "[]", '{"text": "two"}', '{"no": 1}', '{"text": "three"}', "{", "1"]
    (text / "fr.jsonl").write_text("\n".join(lines) + "\n")
    (text / "en.txt").write_bytes(b"one\n\ntwo\n\nthr\xffee\n\nfour")
    arguments |= {"text_dir": str(text), "shard_bytes": 1 << 20}
    with pytest.raises(
        BadInput, match=r"en\.txt is not UTF-8: line 5|fr\.jsonl line 2 is not a JS"
    ):
        prepare.prepare(**arguments)
    for name, shard_bytes in {"store": 1 << 20, "parts": 30}.items():
        changes = {"store_dir": str(tmp_path / name), "shard_bytes": shard_bytes}
        prepare.prepare(**arguments | changes, skip_bad_documents=True)
        out = capsys.readouterr().out
        assert "fr: 4 documents cannot be read and are left out: " in out
        assert f"{text}/fr.jsonl " in out and ".partial-" not in out
    store = TokenStore(tmp_path / "store")
    entries = store.manifest["languages"]
    assert {name: entry["num_bad_documents"] for name, entry in entries.items()} == {
        "en": 1,
        "fr": 4,
    }
    tokens = store.read("fr", "train", 0, store.num_tokens("fr", "train"))
    assert vocabularies[".model"].decode(tokens) == "onetwo"
    assert contents(tmp_path / "store") == contents(tmp_path / "parts")
    # Also when it is read to train a vocabulary.
    task = languages_of(text_files.find_languages(text))[0]
    source = types.SimpleNamespace(language_text=text_files.LanguageText("en", (text / "en.txt",)))
    task = dataclasses.replace(task, task=types.SimpleNamespace(source=source))
    assert list(dataclasses.replace(task, skip_bad=True).documents_of_files()) == [
        "one",
        "two",
        "four",
    ]
    with pytest.raises(BadInput, match="not UTF-8"):
        list(task.documents_of_files())


# --- All of them ---------------------------------------------------------------------------------


def test_same_bytes_from_1_2_4_workers(arguments, expected, text_dir, tmp_path, monkeypatch):
    manifests = set()
    for num_workers in (1, 2, 4):
        store_dir = tmp_path / str(num_workers)
        prepare.prepare(**arguments | {"store_dir": str(store_dir), "num_workers": num_workers})
        manifests.add(assert_expected(store_dir, expected, text_dir))
    monkeypatch.setattr(prepare_shards, "_TOKENS_PER_READ", 500)
    large = {"store_dir": str(tmp_path / "large"), "shard_bytes": 1 << 30}
    prepare.prepare(**arguments | large)
    manifests.add(assert_expected(tmp_path / "large", expected, text_dir))
    assert len(manifests) == 1
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "4", "large"]


def test_an_array_and_a_merge(arguments, expected, text_dir, tmp_path, capsys):
    run = lambda **more: prepare.prepare(**arguments | more)  # noqa: E731
    run(shard="0/3")
    run(shard="2/3")
    assert "shard 2/3: done; when all 3 are, --merge makes the store" in capsys.readouterr().out
    with pytest.raises(BadInput) as error:
        run(merge=True)
    message = str(error.value)
    num_missing, num_shards = map(int, re.findall(r"^(\d+) of (\d+) shards are not", message)[0])
    there = finished(tmp_path / "store.shards")
    assert num_shards - num_missing == len(there) > num_missing > 5
    named = re.findall(r"[a-z]+-\d{5}-of-\d{5}", message)
    assert len(set(named)) == 5 and not any(f"{name}.tokens" in there for name in named)
    assert message.endswith(f" and {num_missing - 5} more; run their --shard=i/N again")
    assert not (tmp_path / "store").exists()
    run(shard="1/3", num_workers=2)
    run(merge=True)
    pool = {"store_dir": str(tmp_path / "pool"), "num_workers": 2}
    run(**pool)
    manifest = assert_expected(tmp_path / "store", expected, text_dir)
    assert manifest == assert_expected(tmp_path / "pool", expected, text_dir)
    assert sorted(os.listdir(tmp_path)) == ["pool", "store"]
    capsys.readouterr()
    run(shard="1/3")
    assert "up to date, nothing to do" in capsys.readouterr().out


def test_shards_are_removed_where_a_kill_came_behind_the_store(arguments, tmp_path, capsys):
    prepare.prepare(**arguments | {"store_dir": str(tmp_path / "other")}, shard="0/1")
    (tmp_path / "other.shards").rename(tmp_path / "kept")
    prepare.prepare(**arguments)
    (tmp_path / "kept").rename(tmp_path / "store.shards")
    prepare.prepare(**arguments)
    assert "is up to date, nothing to do" in capsys.readouterr().out.splitlines()[-1]
    assert os.listdir(tmp_path) == ["store"]


def test_the_text_must_be_that_of_the_shards(arguments, text_dir, tmp_path):
    copy = tmp_path / "text"
    copy.mkdir()
    for name in ("en.txt", "fr.jsonl"):
        (copy / name).write_bytes((text_dir / name).read_bytes())
    run = lambda **more: prepare.prepare(**arguments | {"text_dir": str(copy)} | more)  # noqa: E731
    run(shard="0/1")
    (copy / "small.txt").write_text("one\n\ntwo")
    run(shard="0/1")
    (copy / "small.txt").write_text("one\n\ntwo and more")
    with pytest.raises(BadInput, match=r"^1 of \d+ shards are not finished in .*: small-00000-of-"):
        run(merge=True)
    (copy / "small.txt").unlink()
    with open(copy / "fr.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(BadInput, match=r"\d+ of \d+ shards are not finished in .*: fr-"):
        run(merge=True)
    run(num_workers=1)
    assert TokenStore(tmp_path / "store").num_documents("fr", "validation") == 15


def test_bad_arguments(arguments, tmp_path):
    def refuse(message, **changes):
        with pytest.raises(BadInput, match=message):
            prepare.prepare(**arguments | changes)
        assert not os.listdir(tmp_path)

    for share in ("3", "3/3", "-1/3", "1/0", "a/b", ""):
        refuse("is no share of the work; write i/N with 0 <= i < N", shard=share)
    refuse("--shard, --merge and --runner exclude each other", shard="0/2", merge=True)
    refuse("num_workers must be at least 1", num_workers=0)
    refuse("shard_bytes must be at least 1", shard_bytes=0)
    missing = {"vocabulary_path": str(tmp_path / "v.model")}
    refuse("train it with tools/train_vocabulary.py", merge=True, **missing)
    refuse(r"(\d+) of \1 shards are not finished", merge=True)
    refuse("no local folder: give one for the finished shards", store_dir="gs://bucket/store")
    with (
        pytest.raises(BadInput, match="shards.* now$"),
        prepare._work_folder(tmp_path / "store.shards", alone=False, merge=False),
    ):
        prepare.prepare(**arguments)


def test_languages_that_are_too_short(arguments, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    arguments |= {"text_dir": str(text)}
    (text / "en.txt").write_text("one\n\ntwo")
    (text / "xx.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(BadInput, match=r"^'xx' has no text: nothing but whitespace in .*xx\.jsonl"):
        prepare.prepare(**arguments)
    (text / "xx.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(BadInput, match="needs 2 documents.*'xx' has 1 "):
        prepare.prepare(**arguments)
    (text / "xx.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare.prepare(**arguments)


def test_the_flags_are_bindings():
    given = [
        "p",
        "--shard=1/3",
        "--merge",
        "--merge=false",
        "--runner=X",
        "--num_workers=2",
        "--x=1",
    ]
    assert prepare._as_bindings(given) == [
        "p", "--gin.prepare.shard='1/3'", "--gin.prepare.merge=True", "--gin.prepare.merge=False",
        "--gin.prepare.runner='X'", "--gin.prepare.num_workers=2", "--x=1",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".model", ".json"])
def test_tokens_decode_to_the_text(suffix, vocabularies, tmp_path, monkeypatch):
    """All 46 languages and 13 programming languages, to the character."""
    monkeypatch.setattr(prepare, "find_languages", lambda *_: languages_of(demo_files()))
    vocab = vocabularies[suffix]
    prepare.prepare(
        task_module="", mixture_or_task_name="", vocabulary_path=str(vocab.path), vocab_size=3000,
        store_dir=str(tmp_path / "store"), shard_bytes=4000,
    )  # fmt: skip
    store = TokenStore(tmp_path / "store")
    assert len(store.languages) == 46 + 13
    for label, paths in demo_files().items():
        texts = [text for path in paths for text in text_files.read_documents(path)]
        decoded = []
        for split in ("train", "validation"):
            tokens = store.read(label, split, 0, store.num_tokens(label, split))
            ends = store.read_document_ends(label, split).astype(int)
            decoded += [vocab.decode(ids) for ids in np.split(tokens, ends)[:-1]]
        assert decoded == texts, label


# --- Processes that die --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(1)
    for label in ("aa", "bb", "cc"):
        documents = (f"{n} {sentence(rng, 400)}" for n in range(600))
        (folder / f"{label}.txt").write_text("\n\n".join(documents))
    return folder


@pytest.fixture
def large(large_text, vocabularies, tmp_path):
    return {
        "task_module": "", "mixture_or_task_name": "", "text_dir": str(large_text),
        "vocabulary_path": str(vocabularies[".json"].path), "vocab_size": 3000,
        "store_dir": str(tmp_path / "store"), "shard_bytes": 12_500, "num_workers": 2,
    }  # fmt: skip


@contextlib.contextmanager
def started(arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def finished(folder):
    return {path.name: path.stat().st_ino for path in Path(folder).glob("*.tokens")}


def wait_for(condition, process, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)


def children(process):
    return [
        int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids):
    end = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_three_kills(large, tmp_path):
    undisturbed = large | {"store_dir": str(tmp_path / "undisturbed"), "num_workers": 1}
    with started(undisturbed) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    num_shards = int(out.split("tokenising ")[1].split()[0])
    folder, kept = tmp_path / "store.shards", {}
    for share in (0.15, 0.4, 0.7):
        with started(large) as process:
            num = int(num_shards * (share + random.random() * 0.1))
            wait_for(lambda num=num: len(finished(folder)) >= num, process)
            workers = children(process)
            assert not (folder / f"aa{prepare_shards.UNFINISHED}0").exists()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert len(workers) >= 2
            assert_gone(workers)
        now = finished(folder)
        assert kept.items() <= now.items() and len(now) < num_shards  # nothing was done again
        kept = now
        (folder / f"aa{prepare_shards.UNFINISHED}0").touch()
    (tmp_path / "store.partial-merge" / "aa").mkdir(
        parents=True
    )  # as a kill in the merge leaves it
    with started(large) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert f"{len(kept)} of {num_shards} shards were finished already and are kept" in out
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")
    assert sorted(os.listdir(tmp_path)) == ["store", "undisturbed"]


def test_a_worker_that_is_killed(large, tmp_path):
    folder = tmp_path / "store.shards"
    with started(large) as process:
        wait_for(lambda: len(finished(folder)) >= 5, process)
        workers = children(process)
        # One of them is multiprocessing's own and does no work.
        for pid in workers:
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                break
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.count("\n") == 1, err
    assert "bloomjax: a worker process was ended by SIGKILL while it worked on " in err
    assert "too little memory?; what was finished is kept: run the same command again" in err
    assert_gone(workers)
    assert len(finished(folder)) >= 5 and not list(folder.glob("*.partial-*"))


@pytest.mark.parametrize("num_finished", [0, 5])
def test_control_c(large, tmp_path, num_finished):
    folder = tmp_path / "store.shards"
    with started(large) as process:
        # With none finished the workers are just being started.
        wait_for(
            lambda: len(children(process)) > 1 and len(finished(folder)) >= num_finished, process
        )
        workers = children(process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        start_seconds = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - start_seconds < 5
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err
    assert_gone(workers)
    assert len(finished(folder)) >= num_finished and not list(folder.glob("*.partial-*"))
    assert not (tmp_path / "store").exists()


def work(task, report):
    report(1, task, 0)
    if task == 5:
        raise BadInput("five is right out")
    if task == 6:
        raise ValueError("six")
    if task == 7:
        os._exit(3)
    if task == 8:
        time.sleep(60)
    return task * task


def test_workers_die_with_their_parent_whatever_they_do():
    program = (
        "from test_prepare_shards import work\nfrom bloomjax import prepare_pool\n"
        "list(prepare_pool.run(work, [1, 8, 8], 2, lambda task, *_: print(task, flush=True)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "1" in process.stdout.readline()
        time.sleep(1.0)
        workers = children(process)
        assert len(workers) >= 2
        process.kill()
        assert_gone(workers)


def test_pool():
    reports = []
    report = lambda task, *numbers: reports.append((task, *numbers))  # noqa: E731
    tasks = [1, 2, 3, 4]
    assert sorted(prepare_pool.run(work, tasks, 3, report)) == [(1, 1), (2, 4), (3, 9), (4, 16)]
    assert sorted(reports) == [(task, 1, task, 0) for task in tasks]
    assert list(prepare_pool.run(work, tasks, 1, report)) == [(1, 1), (2, 4), (3, 9), (4, 16)]
    assert list(prepare_pool.run(work, [], 3, report)) == []
    for bad, kind, message in (
        (5, BadInput, "^five is right out$"),
        (6, RuntimeError, "(?s)in a worker process:.*ValueError: six"),
        (7, BadInput, "was ended with exit code 3 while it worked on 7; what was"),
    ):
        with pytest.raises(kind, match=message):
            list(prepare_pool.run(work, [bad, bad], 2, report))


# --- Object storage ------------------------------------------------------------------------------

GCS = """
import sys
import gcs_server
server = gcs_server.Server()
def finish():
    from bloomjax.token_store import TokenStore
    prefix = "below/store/"
    store = TokenStore("gs://bucket/" + prefix)
    store.verify()
    assert all(name.startswith(prefix) for name in server.objects)
    for name, (data, _) in server.objects.items():
        path = Path(sys.argv[2]) / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    name = prefix + "fr/train/tokens/c/0"
    data, generation = server.objects[name]
    server.objects[name] = data[:99] + bytes([data[99] ^ 1]) + data[100:], generation + 1
    try:
        TokenStore("gs://bucket/" + prefix).verify()
    except ValueError as error:
        print(error)
"""


def test_google_cloud_storage(arguments, expected, text_dir, tmp_path):
    """TensorStore's own driver, against a server that stands in for Google's; two processes write."""
    changes = {"store_dir": "gs://bucket/below/store", "num_workers": 2}
    changes["shards_dir"] = str(tmp_path / "shards")
    program = f"from pathlib import Path\n{GCS}\n{PROGRAM}\nfinish()"
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments | changes), str(tmp_path / "copy")],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_expected(tmp_path / "copy", expected, text_dir)
    last = result.stdout.splitlines()[-1]
    assert "gs://bucket/below/store/: fr train tokens 0 to " in last and "Digest mismatch" in last
    assert os.listdir(tmp_path) == ["copy"]


# --- Beam ----------------------------------------------------------------------------------------


def test_beam_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(BadInput, match=r"--runner=FlinkRunner needs .*'bloomjax\[data,beam\]'"):
        prepare_beam.run(print, [], "FlinkRunner", [])


def test_beam(arguments, expected, text_dir, tmp_path):
    pytest.importorskip("apache_beam", reason="stands in an environment of its own")
    prepare.prepare(**arguments, runner="DirectRunner")
    pool = {"store_dir": str(tmp_path / "pool"), "num_workers": 2}
    prepare.prepare(**arguments | pool)
    manifest = assert_expected(tmp_path / "store", expected, text_dir)
    assert manifest == assert_expected(tmp_path / "pool", expected, text_dir)
    with pytest.raises(BadInput, match="NoSuchRunner"):
        prepare.prepare(**arguments | {"store_dir": str(tmp_path / "x")}, runner="NoSuchRunner")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "en.txt").write_bytes(b"one\n\ntwo \xff\n")
    bad = {"text_dir": str(tmp_path / "bad"), "store_dir": str(tmp_path / "x")}
    with pytest.raises(BadInput, match=r"^\S*en\.txt is not UTF-8: line 3, byte offset 9$"):
        prepare.prepare(**arguments | bad, runner="DirectRunner")
