"""tools/train_vocabulary.py: what it trains on, what it prints, what it refuses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bloomjax import config
from bloomjax.vocabulary import open_vocabulary, train_byte_level_bpe, train_sentencepiece

pytest.importorskip("seqio", reason="needs the extra `data`")

REPOSITORY = Path(__file__).resolve().parent.parent
TOOL = REPOSITORY / "tools" / "train_vocabulary.py"
TEXT = {
    "en": [f"The river was high in spring {number}." for number in range(20)],
    "fr": [f"Le fleuve était haut au printemps {number}.\n  À demain" for number in range(40)],
}
# Of 20 and 40 documents 5 % are held out.
TRAINING = {"en": TEXT["en"][:-1], "fr": TEXT["fr"][:-2]}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_vocabulary", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tool, tmp_path, monkeypatch, capsys):
    """Runs the tool on TEXT, in an empty folder; gives back exit code, stdout and stderr."""
    (tmp_path / "text").mkdir()
    for language, texts in TEXT.items():
        (tmp_path / "text" / f"{language}.txt").write_text("\n\n".join(texts))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    files = ["--gin_file=tiny.gin", "--gin_file=text_files.gin"]

    def run(*flags, files=files, text_dir="../text"):
        given = [f"--gin.TEXT_DIR='{text_dir}'"] if text_dir else []
        for flag in (tool._KIND, tool._SIZE, tool._OUTPUT):
            flag._flagvalues[flag.name].unparse()
        with pytest.raises(SystemExit) as error:
            config.call(tool.main, [str(TOOL), *files, *given, *flags])
        captured = capsys.readouterr()
        return error.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "kind, name, train",
    [
        ("bpe", "v.json", train_byte_level_bpe),
        ("sentencepiece", "v.model", train_sentencepiece),
    ],
)
def test_it_is_trained_on_what_is_not_held_out(call, tmp_path, kind, name, train):
    code, out, err = call(f"--kind={kind}", "--size=330", f"--output=new/{name}")
    assert (code, err) == (0, "")
    vocab = open_vocabulary(Path("new") / name)
    expected = train([text for texts in TRAINING.values() for text in texts], name, 330)
    assert vocab.path.read_bytes() == expected.path.read_bytes()

    lines = out.splitlines()
    assert "330 tokens on 2 languages" in lines[0]
    assert lines[1].split() == ["language", "documents", "bytes", "tokens", "bytes", "per", "token"]
    total = [0, 0, 0]
    for line, (language, texts) in zip(lines[2:4], TRAINING.items(), strict=True):
        numbers = [
            len(texts),
            len("".join(texts).encode()),
            sum(map(len, map(vocab.encode, texts))),
        ]
        total = [sum(pair) for pair in zip(total, numbers, strict=True)]
        assert line.split() == [language, *row(numbers)]
    assert lines[4].split() == ["total", *row(total)]
    assert len({len(line) for line in lines[1:5]}) == 1  # columns
    assert lines[5] == f"new/{name}: 330 tokens, sha256 {vocab.fingerprint[:12]}"
    assert lines[6] == f"use it with --gin.VOCABULARY=\"'new/{name}'\" --gin.VOCAB_SIZE=330"
    assert len(lines) == 7


def row(numbers):
    return [*(f"{number:,}" for number in numbers), f"{numbers[1] / numbers[2]:.2f}"]


def test_held_out_fraction_and_the_size_of_large_models(call, tmp_path):
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / "en.txt").write_text("\n\n".join(TEXT["en"]))
    code, out, err = call(
        "--kind=bpe", "--size=270", "--output=v.json", "--gin.prepare.holdout_fraction=0.5",
        files=["--gin_file=560m.gin"], text_dir="../roots",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.splitlines()[2].split()[:2] == ["en", "10"]
    # prepare.vocab_size is a number of its own there.
    assert out.endswith(" --gin.VOCAB_SIZE=270 --gin.prepare.vocab_size=270\n")


def test_never_overwrites_and_refuses_in_one_line(call, tmp_path):
    Path("there.json").write_text("mine")

    def refuse(message, *flags, **options):
        flags = {"--kind": "bpe", "--size": "300", "--output": "v.json"} | dict(
            flag.split("=", 1) for flag in flags
        )
        code, out, err = call(
            *(f"{name}={value}" for name, value in flags.items() if value), **options
        )
        assert code == 1 and err.count("\n") == 1
        assert err.startswith("bloomjax: ") and message in err, err
        assert [path.name for path in Path().iterdir()] == ["there.json"]
        assert Path("there.json").read_text() == "mine"
        return out

    # Before any text is read.
    assert refuse("there.json exists already", "--output=there.json") == ""
    assert refuse("must end in .json: v.model", "--output=v.model") == ""
    assert refuse("must end in .model: v.json", "--kind=sentencepiece") == ""
    assert refuse("VOCAB_SIZE 12 is too small", "--size=12") == ""
    assert refuse("give all of --kind (bpe or sentencepiece), --size", "--kind=") == ""
    assert refuse("--size (tokens) and --output (a new file)", "--size=") == ""
    assert refuse("give all of", "--output=") == ""
    assert refuse("should be one of <bpe|sentencepiece>", "--kind=unigram") == ""
    assert refuse("--size=many", "--size=many") == ""
    assert refuse("TEXT_DIR must be given", text_dir=None) == ""
    assert refuse("does not bind prepare.task_module", files=[], text_dir=None) == ""
    assert refuse("held-out fraction must be", "--gin.prepare.holdout_fraction=1.0") == ""
    assert refuse("must be float, got 'x'", "--gin.prepare.holdout_fraction='x'") == ""
    assert refuse("there is no folder", text_dir="missing") == ""
    refuse("VOCAB_SIZE 9000 is too large", "--size=9000")


def test_as_a_command(tmp_path):
    """Nothing but the table on stdout, and no word from TensorFlow on stderr."""
    flags = ["--gin_file=tiny.gin", "--kind=bpe", "--size=600", "--output=v.json"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *flags], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 1 + 59 + 1 + 2
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]
    assert open_vocabulary(tmp_path / "v.json").size == 600
