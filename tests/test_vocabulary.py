"""Vocabularies: exactness, fixed ids, determinism, and training like BLOOM's."""

import collections
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from bloomjax.errors import BadInput
from bloomjax.vocabulary import (
    ByteLevelBPEVocabulary,
    SentencePieceVocabulary,
    open_vocabulary,
    train_byte_level_bpe,
    train_sentencepiece,
)

CODE = """def mean(values: list[float]) -> float:
    if not values:\t# nothing to divide by
\t\traise ValueError("empty")
    total = 0
    for value in values:
            total += value


    return total / len(values)  \r
"""
TEXTS = [
    "The river was high in spring, and the boats stayed at the quay until the 21st of May 1987.",
    "Le fleuve était haut au printemps, et les bateaux restaient à quai jusqu'en mai.",
    "El río venía crecido en primavera y los barcos no salieron hasta mayo.",
    "नदी वसंत में ऊँची थी और नावें मई तक घाट पर रहीं।",
    "春天河水很高，船一直停在码头，直到五月。",
    "كان النهر مرتفعا في الربيع وبقيت القوارب عند الرصيف حتى شهر مايو.",
    "நதி வசந்த காலத்தில் உயரமாக இருந்தது.",
    CODE,
] * 3
STRANGE = [
    "",
    " ",
    "   three spaces before, two after  ",
    "\n\n\t\t \n",
    "a\u2581b",
    "\u2581\u2581 \u2581",
    "nul \0 and bell \a",
    "</s> <s> <unk> <pad> <0x41>",
    " \u2047 ",
    "e\u0301 \u00e9 \ufb01 \uff12\uff13 \u2460",
    "\U0001f600\U0001f469\u200d\U0001f680 \U0010ffff",
    "\ufeffmark",
    "no\u00a0break \u3000wide \u2028line",
    "123456 7.50",
    CODE,
]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    return train_sentencepiece(TEXTS, path, 560)


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    """A byte-level BPE as BLOOM's: no normaliser, special tokens 0 to 3."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def random_texts(num_texts):
    rng = random.Random(0)
    blocks = [(0, 0x7F), (0x80, 0x7FF), (0x900, 0xDFF), (0x2500, 0x25FF), (0x4E00, 0x9FFF)]
    blocks += [(0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x20, 0x20), (0x2581, 0x2581)]
    for _ in range(num_texts):
        yield "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 60)))


def test_sentencepiece_gives_back_every_text(vocab):
    for text in [*TEXTS, *STRANGE, *random_texts(500)]:
        ids = vocab.encode(text)
        assert vocab.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3}
        assert max(ids, default=0) < vocab.size


def test_bpe_gives_back_every_text(bpe_path):
    vocab = ByteLevelBPEVocabulary(bpe_path)
    for text in [*TEXTS, *STRANGE, *random_texts(500)]:
        ids = vocab.encode(text)
        assert vocab.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3}


def test_batches_are_encoded_as_single_texts(vocab, bpe_path):
    for vocabulary in (vocab, ByteLevelBPEVocabulary(bpe_path)):
        for texts in (TEXTS, [*TEXTS, *STRANGE], []):
            assert vocabulary.encode_batch(texts) == [vocabulary.encode(text) for text in texts]


def test_special_ids_and_fingerprint(vocab, bpe_path):
    for vocabulary in (vocab, ByteLevelBPEVocabulary(bpe_path)):
        ids = (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
        assert ids == (0, 1, 2, 3)
        digest = hashlib.sha256(vocabulary.path.read_bytes()).hexdigest()
        assert vocabulary.fingerprint == digest
        assert vocabulary.decode([1, *vocabulary.encode("one two"), 2, 3]) == "one two"
    assert vocab.size == 560
    assert ByteLevelBPEVocabulary(bpe_path).size == 400


def test_pieces_are_as_asked(vocab):
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocab.path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size()) if not model.is_byte(i)]
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert not [p for p in pieces[4:] if len(p) > 1 and any(c.isdigit() for c in p)]
    assert any(len(piece) > 1 and set(piece) == {"\u2581"} for piece in pieces)
    assert not [piece for piece in pieces if set(piece) & set("\n\t\r ")]


def test_sentencepiece_that_has_seen_no_space(tmp_path):
    texts = ["春天河水很高，船一直停在码头，直到五月。" * 5, "abababab"] * 5
    vocab = train_sentencepiece(texts, tmp_path / "no_space.model", 290)
    assert vocab.encode("a b")[1:-1] == [4 + ord(" ")]
    for text in [*TEXTS, *STRANGE, *random_texts(200)]:
        assert vocab.decode(vocab.encode(text)) == text
    assert vocab.encode_batch(STRANGE) == [vocab.encode(text) for text in STRANGE]


def test_training_is_deterministic(vocab, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "elsewhere" / "other.model", 560)
    assert again.path.read_bytes() == vocab.path.read_bytes()
    fewer = train_sentencepiece(TEXTS[1:8], tmp_path / "fewer.model", 560)
    assert fewer.fingerprint != again.fingerprint


def test_largest_vocabulary_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"VOCAB_SIZE 9000 is too large .* at most (\d+)") as error:
        train_sentencepiece(TEXTS, tmp_path / "big.model", 9000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert not list(tmp_path.iterdir())
    assert train_sentencepiece(TEXTS, tmp_path / "big.model", largest).size == largest
    with pytest.raises(BadInput, match=f"at most {largest} "):
        train_sentencepiece(TEXTS, tmp_path / "bigger.model", largest + 1)


def test_smallest_vocabulary_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"VOCAB_SIZE 300 is too small .* need \d+") as error:
        train_sentencepiece(TEXTS, tmp_path / "small.model", 300)
    smallest = int(str(error.value).split()[-1])
    assert train_sentencepiece(TEXTS, tmp_path / "small.model", smallest).size == smallest
    for size in (-1, 0, 260):
        with pytest.raises(BadInput, match="4 special tokens and 256 bytes"):
            train_sentencepiece(TEXTS, tmp_path / "x.model", size)


def test_training_refuses(vocab, tmp_path):
    before = vocab.path.read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        train_sentencepiece(TEXTS, vocab.path, 500)
    assert vocab.path.read_bytes() == before
    with pytest.raises(BadInput, match="no text"):
        train_sentencepiece(["", "\n\t"], tmp_path / "x.model", 500)
    with pytest.raises(BadInput, match=r"must end in \.model"):
        train_sentencepiece(TEXTS, tmp_path / "x.json", 500)
    assert not list(tmp_path.iterdir())


def test_open_by_name(vocab, bpe_path, tmp_path):
    assert isinstance(open_vocabulary(vocab.path), SentencePieceVocabulary)
    assert isinstance(open_vocabulary(str(bpe_path)), ByteLevelBPEVocabulary)
    with pytest.raises(BadInput, match=r"vocab\.txt is no vocabulary"):
        open_vocabulary(tmp_path / "vocab.txt")
    with pytest.raises(BadInput, match="there is no vocabulary .* has: small.model"):
        open_vocabulary(vocab.path.with_name("missing.model"))
    with pytest.raises(BadInput, match="no such folder"):
        open_vocabulary(tmp_path / "missing" / "tokenizer.json")
    with pytest.raises(BadInput, match="cannot read the vocabulary"):
        (tmp_path / "folder.model").mkdir()
        open_vocabulary(tmp_path / "folder.model")


def test_damaged_files_are_refused(vocab, bpe_path, tmp_path):
    whole = vocab.path.read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"words\n" * 9)):
        path = tmp_path / f"{name}.model"
        path.write_bytes(data)
        with pytest.raises(BadInput, match=f"{name}.model"):
            open_vocabulary(path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bpe_path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"is not a tokenizer\.json"):
        open_vocabulary(path)


def test_other_special_ids_are_refused(bpe_path, tmp_path):
    def train(**options):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=600, minloglevel=2,
            model_type="bpe", hard_vocab_limit=False, **options,
        )  # fmt: skip
        path = tmp_path / "other.model"
        path.write_bytes(model.getvalue())
        return path

    with pytest.raises(BadInput, match=r"special ids \(0, 1, 2, -1\)"):
        open_vocabulary(train(byte_fallback=True))
    with pytest.raises(BadInput, match="no byte fallback"):
        open_vocabulary(train(pad_id=3))
    renamed = bpe_path.read_text().replace('"</s>"', '"<end>"')
    (tmp_path / "tokenizer.json").write_text(renamed)
    with pytest.raises(BadInput, match=r"special ids \(0, 1, None, 3\)"):
        open_vocabulary(tmp_path / "tokenizer.json")


# ---- byte-level BPE as BLOOM's ----

# What BLOOM's expression means: no word contains space, parentheses, "|" or these. (Python's \s has U+001C to 1F too.)
_BETWEEN_WORDS = (
    "().,!?|…。，、।۔،\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
)
WORD = re.compile(f" ?[^{_BETWEEN_WORDS}]+")
# GPT-2 writes bytes that cannot be seen as the characters from U+0100.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
LETTERS = {byte: chr(byte) for byte in VISIBLE} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}


def words(text):
    """`text` in BLOOM's words and what is between them."""
    found, end = [], 0
    for match in WORD.finditer(text):
        found += [text[end : match.start()]] * (match.start() > end) + [match.group()]
        end = match.end()
    return found + [text[end:]] * (end < len(text))


def reference_merges(texts, vocab_size):
    """The textbook algorithm: join the most frequent pair, the one of smaller ids among equals."""
    ids = {letter: 4 + n for n, letter in enumerate(sorted(LETTERS.values()))}
    counts = collections.Counter(
        tuple(LETTERS[byte] for byte in word.encode()) for text in texts for word in words(text)
    )
    merges = []
    while len(ids) + 4 < vocab_size:
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault("".join(best), len(ids) + 4)
        merges.append(list(best))
        joined = collections.Counter()
        for word, count in counts.items():
            new, at = [], 0
            while at < len(word):
                width = 2 if word[at : at + 2] == best else 1
                new.append("".join(word[at : at + width]))
                at += width
            joined[tuple(new)] += count
        counts = joined
    return merges, ids


@pytest.fixture(scope="module")
def bloom_like(tmp_path_factory):
    return train_byte_level_bpe(TEXTS, tmp_path_factory.mktemp("bloom") / "bloom.json", 420)


def test_bpe_is_what_the_textbook_makes(bloom_like):
    model = json.loads(bloom_like.path.read_text())["model"]
    merges, ids = reference_merges(TEXTS, 420)
    assert model["merges"] == merges and len(merges) >= 150
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    assert model["vocab"] == special | ids
    assert bloom_like.size == 420


def test_bpe_cuts_words_as_bloom_does(bloom_like):
    tokenizer = tokenizers.Tokenizer.from_file(str(bloom_like.path))
    assert tokenizer.normalizer is None
    corpus = Path(__file__).resolve().parent.parent / "tasks" / "demo_corpus"
    texts = [path.read_text() for path in sorted(corpus.rglob("*")) if path.is_file()]
    assert len(texts) > 59
    num_words = 0
    for text in [*texts, *TEXTS, *STRANGE, *random_texts(500), "a|b [c] (d|e)", "\x1c\x1da b\x85c"]:
        expected = words(text)
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in pieces] == expected
        assert [p for p, _ in pieces] == ["".join(LETTERS[b] for b in w.encode()) for w in expected]
        num_words += len(expected)
    assert num_words > 40_000


def test_trained_bpe_gives_back_every_text(bloom_like):
    for text in [*TEXTS, *STRANGE, *random_texts(500)]:
        ids = bloom_like.encode(text)
        assert bloom_like.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3}
    assert bloom_like.decode([1, *bloom_like.encode("one two"), 2, 3]) == "one two"


def test_bpe_training_is_the_same_in_every_process(tmp_path):
    program = (
        "import sys, pathlib; from bloomjax.vocabulary import train_byte_level_bpe as train;"
        "texts = [p.read_text() for p in sorted(pathlib.Path(sys.argv[1]).glob('*.txt'))];"
        "train(iter(texts), sys.argv[2], 2000)"
    )
    root = Path(__file__).resolve().parent.parent
    corpus = root / "tasks" / "demo_corpus"
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        done = subprocess.run(
            [sys.executable, "-c", program, str(corpus), str(tmp_path / f"{seed}.json")],
            env=os.environ | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_bpe_training_refuses(bloom_like, tmp_path):
    before = bloom_like.path.read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        train_byte_level_bpe(TEXTS, bloom_like.path, 500)
    assert bloom_like.path.read_bytes() == before
    with pytest.raises(BadInput, match="no text"):
        train_byte_level_bpe(["", ""], tmp_path / "x.json", 500)
    with pytest.raises(BadInput, match=r"byte-level BPE vocabulary must end in \.json"):
        train_byte_level_bpe(TEXTS, tmp_path / "x.model", 500)
    for size in (-1, 260):
        with pytest.raises(BadInput, match="4 special tokens and 256 bytes"):
            train_byte_level_bpe(TEXTS, tmp_path / "x.json", size)
    with pytest.raises(BadInput, match=r"VOCAB_SIZE 9000 is too large .* at most \d+") as error:
        train_byte_level_bpe(TEXTS, tmp_path / "x.json", 9000)
    largest = int(str(error.value).split("at most ")[1].split()[0])

    def damaged():
        yield TEXTS[0]
        raise BadInput("en.txt is not UTF-8")

    with pytest.raises(BadInput, match=r"^en\.txt is not UTF-8$"):
        train_byte_level_bpe(damaged(), tmp_path / "x.json", 300)
    assert not list(tmp_path.iterdir())
    assert train_byte_level_bpe(TEXTS, tmp_path / "x.json", largest).size == largest
    with pytest.raises(BadInput, match=f"at most {largest} "):
        train_byte_level_bpe(TEXTS, tmp_path / "y.json", largest + 1)
