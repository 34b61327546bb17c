"""tools/train_vocabulary.py: what it trains on, what it prints, what it refuses."""

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bloomjax import config
from bloomjax.vocabulary import open_vocabulary, train_byte_level_bpe, train_sentencepiece
from bloomjax.vocabulary_report import count_words

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
        with pytest.raises(SystemExit) as error:
            config.call(tool.main, [str(TOOL), *files, *given, *flags], tool.FLAGS)
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
    assert lines[0].endswith("of 330 tokens on 2 languages, all of the text")
    assert lines[1].split() == (
        "language documents bytes words tokens bytes per token tokens per word unknown".split()
    )
    total = [0, 0, 0, 0]
    for line, (language, texts) in zip(lines[2:4], TRAINING.items(), strict=True):
        numbers = [
            len(texts),
            len("".join(texts).encode()),
            sum(count_words(text)[0] for text in texts),
            sum(map(len, map(vocab.encode, texts))),
        ]
        total = [sum(pair) for pair in zip(total, numbers, strict=True)]
        assert line.split()[:-1] == [language, *row(numbers)]
        assert re.fullmatch(r"\d+\.\d\d%", line.split()[-1])
    assert lines[4].split()[:-1] == ["total", *row(total)]
    assert len({len(line) for line in lines[1:5]}) == 1  # columns
    assert lines[5] == f"new/{name}: 330 tokens, sha256 {vocab.fingerprint[:12]}"
    assert lines[6] == f"use it with --gin.VOCABULARY=\"'new/{name}'\" --gin.VOCAB_SIZE=330"
    assert len(lines) == 7


def row(numbers):
    _, num_bytes, num_words, num_tokens = numbers
    ratios = num_bytes / num_tokens, num_tokens / num_words
    return [*(f"{number:,}" for number in numbers), *(f"{ratio:.2f}" for ratio in ratios)]


# ---- which text ----


def test_quotas_by_hand(tool):
    """alpha = 1/2: parts as 1 : 2 : 10."""
    sizes = {"c": 10_000, "a": 100, "b": 400}
    assert tool.quotas(sizes, 1.0, None) == sizes
    assert tool.quotas(sizes, 0.5, None) == {"c": 1000, "a": 100, "b": 200}
    assert tool.quotas(sizes, 0.0, None) == {"c": 100, "a": 100, "b": 100}
    assert tool.quotas(sizes, 0.5, 650) == {"c": 500, "a": 50, "b": 100}
    # 2700 - 100 are shared 10 : 2, which b runs out of, too.
    assert tool.quotas(sizes, 0.5, 2700) == {"c": 2200, "a": 100, "b": 400}
    assert tool.quotas(sizes, 0.5, 1900) == {"c": 1500, "a": 100, "b": 300}
    assert tool.quotas(sizes, 0.5, 10_500) == tool.quotas(sizes, 0.5, 10**9) == sizes
    assert tool.quotas(sizes, 1.0, 1050) == {"c": 1000, "a": 10, "b": 40}


def test_quotas_of_roots(tool):
    """BLOOM's alpha over the sizes of ROOTS: shares are p^0.3 / sum p^0.3, and nothing is taken twice."""
    from bloomjax.tasks.languages import NATURAL_LANGUAGES

    sizes = {language.code: language.num_bytes for language in NATURAL_LANGUAGES}
    total = sum(sizes.values())
    power = math.fsum((n / total) ** 0.3 for n in sizes.values())
    exact = tool.quotas(sizes, 0.3, None)
    assert exact["tum"] == sizes["tum"] and all(
        exact[name] < sizes[name] for name in sizes if name != "tum"
    )
    for name, taken in exact.items():
        share = (sizes[name] / total) ** 0.3 / power
        assert taken / sum(exact.values()) == pytest.approx(share, rel=1e-4)
    large = tool.quotas(sizes, 0.3, 10**10)
    assert 10**10 - 46 <= sum(large.values()) <= 10**10
    whole = {name for name in sizes if large[name] == sizes[name]}
    assert {"tum", "ki", "bm"} <= whole and "sw" not in whole
    ratios = [large[name] / sizes[name] ** 0.3 for name in sizes.keys() - whole]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)
    assert max(sizes[name] ** 0.7 for name in whole) <= min(ratios)


def documents(num=4000):
    return [("\u00e9" if n % 3 else "e") * (1 + n * 7919 % 211) for n in range(num)]


def test_chosen_documents_are_spread_evenly_and_differ_with_the_seed(tool):
    texts = documents()
    sizes = [len(text.encode()) for text in texts]
    total = sum(sizes)
    assert list(tool.choose(texts, "xx", total, total, 1)) == texts
    assert list(tool.choose(texts, "xx", 0, total, 1)) == []
    for quota in (total // 100, total // 3, total - 1):
        chosen = list(tool.choose(iter(texts), "xx", quota, total, 1))
        assert chosen == list(tool.choose(texts, "xx", quota, total, 1))
        assert quota - 2 * max(sizes) <= sum(len(text.encode()) for text in chosen) <= quota
        if quota < total - 1:
            assert chosen != list(tool.choose(texts, "xx", quota, total, 2))
            assert chosen != list(tool.choose(texts, "yy", quota, total, 1))
    # A third of every part of the text, of long documents as of short ones.
    numbered = [f"{n:05}" + text for n, text in enumerate(texts)]
    sizes = [len(text.encode()) for text in numbered]
    total = sum(sizes)
    chosen = [int(text[:5]) for text in tool.choose(numbered, "xx", total // 3, total, 1)]
    assert chosen == sorted(set(chosen))
    for first in range(0, 4000, 500):
        part = sum(sizes[n] for n in chosen if first <= n < first + 500)
        assert part == pytest.approx(sum(sizes[first : first + 500]) / 3, abs=2 * max(sizes))
    long = [n for n in range(4000) if sizes[n] > 220]
    assert len(set(chosen) & set(long)) / len(long) == pytest.approx(1 / 3, abs=0.06)


def test_the_rule_never_changes(tool):
    """A vocabulary can be made again years later."""
    texts = documents(200)
    total = sum(len(text.encode()) for text in texts)
    chosen = "".join(tool.choose(texts, "sw", total // 4, total, 42))
    assert hashlib.sha256(chosen.encode()).hexdigest()[:16] == "93f9c2e6abb34283"


@pytest.mark.parametrize("flag", ["--alpha=0", "--max_bytes=900"])
def test_a_subset_is_trained_on(call, tool, flag):
    sizes = {name: len("".join(texts).encode()) for name, texts in TRAINING.items()}
    assert sizes["en"] < sizes["fr"] and sum(sizes.values()) > 2000
    if flag == "--alpha=0":
        quota = dict.fromkeys(sizes, sizes["en"])
    else:
        quota = {name: 900 * size // sum(sizes.values()) for name, size in sizes.items()}
    code, out, err = call("--kind=bpe", "--size=300", "--output=v.json", flag, "--seed=5")
    assert (code, err) == (0, "")
    chosen = {
        name: list(tool.choose(texts, name, quota[name], sizes[name], 5))
        for name, texts in TRAINING.items()
    }
    expected = train_byte_level_bpe(sum(chosen.values(), []), "expected.json", 300)
    assert Path("v.json").read_bytes() == expected.path.read_bytes()
    lines = out.splitlines()
    whole = "en" if flag == "--alpha=0" else "none"
    assert lines[0].endswith(
        f"at most {sum(quota.values()):,} of {sum(sizes.values()):,} bytes; all of: {whole}"
    )
    assert [line.split()[1] for line in lines[2:4]] == [str(len(chosen[name])) for name in TRAINING]


# ---- comparing ----


def test_two_vocabularies_side_by_side(call, tmp_path):
    texts = sum(TRAINING.values(), [])
    ours = train_byte_level_bpe(texts, tmp_path / "a.json", 330)
    theirs = train_sentencepiece(texts, tmp_path / "b.model", 300)
    flags = [f"--vocabulary={ours.path}", f"--compare={theirs.path}"]
    code, out, err = call(*flags, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert found["vocabulary"] == {
        "path": str(ours.path),
        "size": 330,
        "fingerprint": ours.fingerprint,
    }
    assert found["compared_with"]["fingerprint"] == theirs.fingerprint
    assert [entry["language"] for entry in found["languages"]] == list(TRAINING)
    for entry in found["languages"]:
        text = TRAINING[entry["language"]]
        num_bytes = len("".join(text).encode())
        for vocab, side in ((ours, entry), (theirs, entry["compared"])):
            num_tokens = sum(len(vocab.encode(each)) for each in text)
            assert (side["documents"], side["bytes"], side["tokens"]) == (
                len(text),
                num_bytes,
                num_tokens,
            )
            assert side["bytes_per_token"] == num_bytes / num_tokens
            assert side["fertility"] == num_tokens / side["words"]
            # A byte token a line break, the only character here without a piece.
            line_breaks = sum(each.count("\n") for each in text)
            assert side["byte_token_rate"] == (line_breaks / num_tokens if vocab is theirs else 0)
            assert side["unknown_rate"] == 0
        assert entry["ratio"] == entry["tokens"] / entry["compared"]["tokens"]

    code, out, err = call(*flags)
    lines = out.splitlines()
    assert lines[0].startswith("measuring on 2 languages") and lines[5] == ""
    assert lines[6] == f"A = {ours.path} (330), B = {theirs.path} (300)"
    for line, entry in zip(lines[8:10], found["languages"], strict=True):
        other = entry["compared"]
        assert line.split() == [
            entry["language"], f"{entry['tokens']:,}", f"{other['tokens']:,}", f"{entry['ratio']:.3f}",
            f"{entry['fertility']:.2f}", f"{other['fertility']:.2f}",
            f"{entry['bytes_per_token']:.2f}", f"{other['bytes_per_token']:.2f}", "0.00%", "0.00%",
        ]  # fmt: skip
    assert lines[10].split()[0] == "total"
    assert lines[12] == f"{ours.path}: 330 tokens, sha256 {ours.fingerprint[:12]}"
    assert "use it" not in out and list(Path().iterdir()) == []


def test_digits_and_spaces_as_documented(tmp_path):
    texts = ["in 1948  and 1948\n\tnot 1948 " * 3] * 20
    pieces = train_sentencepiece(texts, tmp_path / "v.model", 283)
    whole = train_byte_level_bpe(texts, tmp_path / "v.json", 272)
    assert len(pieces.encode("1948")) == 4 and len(whole.encode(" 1948")) == 1
    assert len(pieces.encode("\n\t")) == 2  # a byte each
    for vocab in (pieces, whole):
        assert (vocab.unk_id, vocab.bos_id, vocab.eos_id, vocab.pad_id) == (0, 1, 2, 3)
        assert not {0, 1, 2, 3} & set(vocab.encode("<unk> <s> </s> <pad> \U0001f600"))


# ---- what it refuses ----


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
    assert refuse("--vocabulary trains nothing", "--vocabulary=there.json") == ""
    assert refuse("or --vocabulary (one that exists)", "--size=") == ""
    assert refuse("no vocabulary missing.json", "--compare=missing.json") == ""
    assert refuse("there.json is not a tokenizer.json", "--compare=there.json") == ""
    assert refuse("--alpha=1.5: it lies between 0", "--alpha=1.5") == ""
    assert refuse("--alpha=nan", "--alpha=nan") == ""
    assert refuse("--max_bytes=0: it must", "--max_bytes=0") == ""
    assert refuse("TEXT_DIR must be given", text_dir=None) == ""
    assert refuse("does not bind prepare.task_module", files=[], text_dir=None) == ""
    assert refuse("held-out fraction must be", "--gin.prepare.holdout_fraction=1.0") == ""
    assert refuse("must be float, got 'x'", "--gin.prepare.holdout_fraction='x'") == ""
    assert refuse("there is no folder", text_dir="missing") == ""
    refuse("VOCAB_SIZE 9000 is too large", "--size=9000")


@pytest.mark.slow
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
