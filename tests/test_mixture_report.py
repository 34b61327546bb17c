"""tools/mixture_report.py: with a store and without one, as lines, as JSON and as a picture."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bloomjax import config, token_store, vocabulary
from bloomjax.mixture_weights import unimax_weights
from bloomjax.tasks.languages import ROOTS_TOKENS, ROOTS_WEIGHTS
from bloomjax.vocabulary_report import count_words

REPOSITORY = Path(__file__).resolve().parent.parent
TOOL = REPOSITORY / "tools" / "mixture_report.py"
TEXT = {
    "en": [f"The river was high in spring {number}." for number in range(40)],
    "zhs": [f"\u6cb3\u6c34\u5728\u6625\u5929\u5f88\u9ad8{number}\u3002" for number in range(30)],
    "code-c": [f"int f{n}(void) {{ return {n}; }}" for n in range(20)],
    "mine": [f"blub blab {number} blib" for number in range(20)],
}
WEIGHTS = {"en": 6.0, "zhs": 3.0, "code-c": 1.0}  # and nothing of 'mine'


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("mixture_report", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tool, tmp_path, monkeypatch, capsys):
    """Runs the tool in an empty folder; gives back exit code, stdout and stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*flags):
        with pytest.raises(SystemExit) as error:
            config.call(tool.main, [str(TOOL), *flags], tool.FLAGS)
        captured = capsys.readouterr()
        return error.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = [document for documents in TEXT.values() for document in documents]
    vocab = vocabulary.train_byte_level_bpe(texts, folder / "v.json", 320)
    store = token_store.write_store(folder / "tokens", TEXT, vocab)
    flags = [
        "--gin_file=tiny.gin", f"--gin.STORE_DIR='{folder / 'tokens'}'",
        f"--gin.VOCABULARY='{folder / 'v.json'}'", f"--gin.TrainData.weights={WEIGHTS}",
        "--gin.SEQUENCE_LENGTH=4", "--gin.TRAIN_STEPS=30", "--gin.BATCH_SIZE=10",
    ]  # fmt: skip
    return vocab, store, flags


def read_json(call, *flags):
    code, out, err = call(*flags, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    return json.loads(out)


def test_bloom_with_nothing_there(call):
    """Shares only: they are the published ones."""
    found = read_json(call, "--gin_file=176b.gin")
    rows = {row["language"]: row for row in found["languages"]}
    assert list(rows) == sorted(ROOTS_WEIGHTS, key=lambda name: -ROOTS_WEIGHTS[name])
    total = sum(ROOTS_WEIGHTS.values())
    for name, row in rows.items():
        assert row["share_declared"] == pytest.approx(ROOTS_WEIGHTS[name] / total, rel=1e-12)
        unknown = "share_in_store", "tokens", "bytes_per_token", "fertility", "epochs"
        assert [row[key] for key in unknown] == [None] * 5
    assert rows["tum"]["name"] == "chiTumbuka" and rows["tum"]["script"] == "Latn"
    assert (found["samples"], found["store"]) == (
        219_999_152,
        None,
    )  # a last partial batch is dropped
    assert found["tokens"] == 2048 * found["samples"]
    # A script is judged by all of its languages: Assamese by Bengali, Traditional by Simplified Chinese.
    warned = {name for name, row in rows.items() if row["warnings"]}
    assert warned == {"te", "kn", "pa", "gu", "or"}
    assert rows["or"]["warnings"] == ["script Orya has 0.036% of the tokens"]
    missing = read_json(call, "--gin_file=176b.gin", "--gin.STORE_DIR='no/store'")
    assert missing["languages"] == found["languages"] and missing["notes"] == [
        "no store at no/store"
    ]


def test_lines_without_a_store(call):
    code, out, err = call("--gin_file=176b.gin")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 1 + 1 + 47 + 1 + 1)
    assert lines[0] == "47 languages; planned are 219,999,152 samples, 450,558,263,296 tokens"
    assert lines[1].split() == ["language", "name", "script", "declared", "warnings"]
    assert lines[2].split() == ["en", "English", "Latn", "30.308378%"]
    assert lines[-3].split() == ["tum", "chiTumbuka", "Latn", "0.000017%"]
    assert lines[-2:] == ["5 of 47 languages with warnings", "no STORE_DIR: shares only"]


def test_weights_by_a_rule_without_a_store(call):
    found = read_json(call, "--gin_file=176b.gin", "--gin_file=ablations/unimax.gin")
    expected = unimax_weights(ROOTS_TOKENS, 4, 366_000_000_000)
    shares = {row["language"]: row["share_declared"] for row in found["languages"]}
    assert shares == pytest.approx(expected, rel=1e-9)
    assert "sizes for these weights: the estimated tokens of ROOTS" in found["notes"]


def test_temperature_without_a_store(call):
    found = read_json(call, "--gin_file=176b.gin", "--gin.TrainData.temperature=2.0")
    shares = {row["language"]: row["share_declared"] for row in found["languages"]}
    roots = {name: weight**0.5 for name, weight in ROOTS_WEIGHTS.items()}
    assert shares["tum"] == pytest.approx(roots["tum"] / sum(roots.values()), rel=1e-9)


def test_with_a_store(call, text):
    vocab, store, flags = text
    found = read_json(call, *flags)
    rows = {row["language"]: row for row in found["languages"]}
    assert list(rows) == ["en", "zhs", "code-c", "mine"] and found["notes"] == []
    assert (found["samples"], found["tokens"]) == (300, 1200)
    total = sum(store.num_tokens(name, "train") for name in TEXT)
    for name, row in rows.items():
        documents = TEXT[name][: store.num_documents(name, "train")]
        ids = [vocab.encode(document) for document in documents]
        num_tokens = sum(map(len, ids)) + len(ids)
        assert row["share_declared"] == pytest.approx(WEIGHTS.get(name, 0) / 10, abs=1e-12)
        assert (row["tokens"], row["share_in_store"]) == (num_tokens, num_tokens / total)
        assert row["bytes_per_token"] == len("".join(documents).encode()) / num_tokens
        words = sum(count_words(document)[0] for document in documents)
        assert row["fertility"] == pytest.approx(sum(map(len, ids)) / words, rel=1e-12)
        # 300 samples of 4 tokens, by share.
        epochs = 300 * WEIGHTS.get(name, 0) / 10 / ((num_tokens - 1) // 4)
        assert row["epochs"] == pytest.approx(epochs, abs=2 / ((num_tokens - 1) // 4))
    assert rows["zhs"]["words_are_characters"] and not rows["en"]["words_are_characters"]
    assert (rows["mine"]["name"], rows["mine"]["script"]) == (None, None)
    assert rows["mine"]["warnings"] == ["in the store, not in the mixture"]

    code, out, _ = call(*flags)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 1 + 1 + 4 + 1
    assert lines[1].split()[3:] == (
        ["declared", "in", "store", "tokens", "bytes/token", "tokens/word", "epochs", "warnings"]
    )
    zhs = rows["zhs"]
    assert lines[3].split() == [
        "zhs", "Simplified", "Chinese", "Hani", "30.000000%", f"{zhs['share_in_store']:.6%}",
        f"{zhs['tokens']:,}", f"{zhs['bytes_per_token']:.2f}", f"{zhs['fertility']:.2f}*",
        f"{zhs['epochs']:.3f}", *" ".join(zhs["warnings"]).split(),
    ]  # fmt: skip
    long = read_json(call, *flags, "--gin.TRAIN_STEPS=3000")
    (warning,) = long["languages"][0]["warnings"]
    assert warning == f"{long['languages'][0]['epochs']:.1f} epochs"


def test_phases_count(call, text):
    """Half of the samples without Chinese."""
    _, _, flags = text
    phases = ["--gin.TrainData.phases=(@Phase(),)", "--gin.Phase.first_sample=150"]
    found = read_json(call, *flags, *phases, "--gin.Phase.weights={'en': 1.0}")
    shares = {row["language"]: row["share_declared"] for row in found["languages"]}
    assert shares == pytest.approx({"en": 0.8, "zhs": 0.15, "code-c": 0.05, "mine": 0}, rel=1e-12)


def test_the_vocabulary_may_be_missing_or_another(call, text, tmp_path):
    vocab, _, flags = text
    found = read_json(call, *flags, "--gin.VOCABULARY='gone.json'")
    assert found["notes"] == ["no tokens per word: no vocabulary gone.json"]
    assert {row["fertility"] for row in found["languages"]} == {None}
    assert found["languages"][0]["bytes_per_token"] > 1
    other = vocabulary.train_byte_level_bpe(["some other text"], tmp_path / "other.json", 262)
    found = read_json(call, *flags, f"--gin.VOCABULARY='{other.path}'")
    assert found["notes"] == [
        f"no tokens per word: {other.path} is not the vocabulary of the store"
    ]
    assert other.fingerprint != vocab.fingerprint


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures(call, text, ending):
    pytest.importorskip("matplotlib")
    _, _, flags = text
    for name, given in (("with", flags), ("without", ["--gin_file=176b.gin"])):
        code, out, err = call(*given, f"--plot={name}.{ending}")
        assert (code, err) == (0, "") and "languages with warnings" in out
    assert sorted(path.name for path in Path().iterdir()) == [f"with.{ending}", f"without.{ending}"]
    if ending == "svg":
        return
    from matplotlib import image

    for name in ("with", "without"):
        pixels = image.imread(f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 150 and np.std(pixels) > 0.02


def test_refusals_in_one_line(call, text):
    _, _, flags = text

    def refuse(message, *given):
        code, out, err = call(*given)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("bloomjax: ") and message in err, err
        assert list(Path().iterdir()) == []

    refuse("there is none at runs/demo/tokens; make it with", "--gin_file=tiny.gin")
    refuse("does not bind TrainData.sequence_length")
    refuse("'nothing:HERE' is not 'module:NAME'", "--gin_file=176b.gin",
           "--gin.TrainData.weights='nothing:HERE'")  # fmt: skip
    refuse("the mixture names xx", *flags, "--gin.TrainData.weights={'xx': 1.0}")
    refuse("pictures end in .png, .svg, .pdf", *flags, "--plot=a.jpeg")
    refuse("there is no folder no", *flags, "--plot=no/a.png")
    refuse("nothing uses the macro SEQUENCE_LENGHT", *flags, "--gin.SEQUENCE_LENGHT=8")


def test_as_a_command(tmp_path):
    """Without TensorFlow."""
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests" / "no_tensorflow")))
    done = subprocess.run(
        [sys.executable, str(TOOL), "--gin_file=176b.gin", "--json"], cwd=tmp_path, check=False,
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["languages"]) == 47
