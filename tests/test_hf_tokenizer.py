"""Tokenizer files: transformers gives our ids and our text, and the vocabulary comes back unchanged."""

import hashlib
import importlib
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from bloomjax.errors import BadInput
from bloomjax.hf_tokenizer import find_vocabulary, tokenizer_files
from bloomjax.vocabulary import (
    ByteLevelBPEVocabulary,
    SentencePieceVocabulary,
    open_vocabulary,
    train_byte_level_bpe,
    train_sentencepiece,
)

CORPUS = Path(__file__).resolve().parent.parent / "tasks" / "demo_corpus"
DOCUMENTS = [
    path.read_text(encoding="utf-8")
    for path in sorted(CORPUS.rglob("*"))
    if path.is_file() and path.name != "README.md"
]
NASTY = [
    "",
    " ",
    "\n",
    "   three before, two after  ",
    " , . ! ? ' n't 's do n't",
    "\u2581",
    "a\u2581b \u2581\u2581 \u2581\u2581\u2581c",
    "nul \0\0 bell \a tab\t\ttab\r\n",
    "<0x41> <0xE2><0x96> unk\u2047 \u2047",
    "e\u0301 \u00e9 \ufb01 \uff12\uff13 \u2460 \ufeff \ufffd",
    "\U0001f600\U0001f469\u200d\U0001f680 \U0010ffff \U00012000 \u16a0",
    "no\u00a0break \u3000wide \u2028line \x1c\x1f\x85",
    "aaaaa ababab abababa aaaaaaaaaaaaaaaa",
    "........ !!!!!!! -------- ======= ((((()))))",
    " " * 77 + "x" + " " * 33 + "\n" * 9,
]
KINDS = ("sentencepiece", "bpe")


def random_texts(num_texts, seed):
    rng = random.Random(seed)
    alphabet = [*"ab .\n1-\u2581\0\té我नி", "  ", "ab", "😀", "\u0301", "the", "\u3000"]
    for _ in range(num_texts):
        some = rng.sample(alphabet, rng.randint(1, len(alphabet)))
        yield "".join(rng.choices(some, k=rng.randint(1, 80)))


TEXTS = [*DOCUMENTS, *NASTY, *random_texts(300, 0)]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    return {
        "sentencepiece": train_sentencepiece(DOCUMENTS, folder / "v.model", 2300),
        "bpe": train_byte_level_bpe(DOCUMENTS, folder / "v.json", 2000),
    }


def write(vocabulary, folder):
    folder.mkdir(exist_ok=True)
    for name, data in tokenizer_files(vocabulary, model_max_length_tokens=64).items():
        (folder / name).write_bytes(data)
    # AutoTokenizer looks at it.
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    return folder


def auto_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_alike(theirs, vocabulary):
    """`theirs`, of transformers, does to all of TEXTS what `vocabulary` does."""
    for text in TEXTS:
        ids = vocabulary.encode(text)
        assert theirs(text)["input_ids"] == theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
        assert theirs.decode([1, *ids, 0, 2, 3, 3], skip_special_tokens=True) == text
        assert theirs.decode([1, *ids, 2, 3]) == f"<s>{text}</s><pad>"


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_ids_and_text(vocabularies, tmp_path, kind):
    vocabulary = vocabularies[kind]
    assert len(DOCUMENTS) >= 46 + 13
    theirs = auto_tokenizer(write(vocabulary, tmp_path))
    check_alike(theirs, vocabulary)
    assert len(theirs) == vocabulary.size


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_knows_special_tokens_and_pads_on_the_left(vocabularies, tmp_path, kind):
    vocabulary = vocabularies[kind]
    theirs = auto_tokenizer(write(vocabulary, tmp_path))
    named = (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert named == (0, 1, 2, 3)
    assert (theirs.padding_side, theirs.model_max_length) == ("left", 64)
    assert theirs.clean_up_tokenization_spaces is False
    short, long = vocabulary.encode("short"), vocabulary.encode("a text that is longer")
    gap = len(long) - len(short)
    assert gap > 0
    assert theirs(["short", "a text that is longer"], padding=True) == {
        "input_ids": [[3] * gap + short, long],
        "attention_mask": [[0] * gap + [1] * len(short), [1] * len(long)],
    }
    # Written out, they are special to transformers, and text to us.
    assert theirs.encode("a</s>") == [*vocabulary.encode("a"), 2]
    assert theirs.encode("a</s>", split_special_tokens=True) == vocabulary.encode("a</s>")
    assert 2 not in vocabulary.encode("a</s>")


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_again_can_be_opened(vocabularies, tmp_path, kind):
    vocabulary = vocabularies[kind]
    auto_tokenizer(write(vocabulary, tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    found = find_vocabulary(tmp_path / "theirs")
    assert found is not None
    again = open_vocabulary(found)
    assert [again.encode(text) for text in TEXTS] == [vocabulary.encode(text) for text in TEXTS]


def test_config(vocabularies):
    config, other = (
        json.loads(tokenizer_files(v, model_max_length_tokens=7)["tokenizer_config.json"])
        for v in vocabularies.values()
    )
    assert config == other
    assert config["model_max_length"] == 7
    # Else transformers 4 makes token_type_ids too, and its BLOOM refuses them.
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["add_prefix_space"] is config["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_comes_back_unchanged(vocabularies, tmp_path, kind):
    vocabulary = vocabularies[kind]
    found = find_vocabulary(write(vocabulary, tmp_path))
    assert found is not None and found.parent == tmp_path
    again = open_vocabulary(found)
    assert again.fingerprint == vocabulary.fingerprint
    assert type(again) is type(vocabulary)
    assert found.read_bytes() == vocabulary.path.read_bytes()
    names = {"tokenizer.json", "tokenizer_config.json", "config.json"}
    names |= {"tokenizer.model"} if kind == "sentencepiece" else set()
    assert {path.name for path in tmp_path.iterdir()} == names


def test_sentencepiece_without_its_model_file(vocabularies, tmp_path):
    vocabulary = vocabularies["sentencepiece"]
    (write(vocabulary, tmp_path) / "tokenizer.model").unlink()
    found = find_vocabulary(tmp_path)
    assert found == tmp_path / "tokenizer.json"
    other = open_vocabulary(found)
    assert isinstance(other, ByteLevelBPEVocabulary)
    assert other.size == vocabulary.size
    for text in [*TEXTS, "</s> <s> <unk> <pad>"]:
        ids = vocabulary.encode(text)
        assert other.encode(text) == ids
        assert other.decode(ids) == other.decode([1, *ids, 2, 3]) == text
    files = tokenizer_files(other, model_max_length_tokens=7)  # exported again: the file as it is
    assert files["tokenizer.json"] == found.read_bytes() and "tokenizer.model" not in files


def test_ties_are_settled_as_sentencepiece_does(tmp_path):
    """Texts of few characters, where pieces can be made in many ways and places."""
    rng = random.Random(0)
    num_compared = 0
    for number, alphabet in enumerate(("ab", "ab ", "a ", "abc ", "ab.- ", "aàâb我 ") * 2):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(5, 300))) for _ in range(60)]
        texts += [rng.choice(alphabet) * rng.randint(1, 60) for _ in range(15)]
        path = tmp_path / f"{number}.model"
        try:
            vocabulary = train_sentencepiece(texts, path, 380)
        except BadInput as error:
            largest = int(str(error).split("at most ")[1].split()[0])
            vocabulary = train_sentencepiece(texts, path, largest)
        data = tokenizer_files(vocabulary, model_max_length_tokens=7)["tokenizer.json"]
        theirs = tokenizers.Tokenizer.from_buffer(data)
        for _ in range(300):
            text = "".join(rng.choices(alphabet + alphabet + "z\u2581", k=rng.randint(1, 200)))
            ids = vocabulary.encode(text)
            assert theirs.encode(text).ids == ids
            assert theirs.decode(ids) == text
            num_compared += len(ids)
    assert num_compared > 50_000


def test_models_that_are_no_bpe_of_bytes_and_characters_are_refused(tmp_path):
    def trained(name, **options):
        model = io.BytesIO()
        options = {"model_type": "bpe", "normalization_rule_name": "identity"} | options
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS[:8]), model_writer=model, vocab_size=900,
            byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2,
            character_coverage=0.98, max_sentence_length=100_000, hard_vocab_limit=False,
            **{"add_dummy_prefix": False, "remove_extra_whitespaces": False} | options,
        )  # fmt: skip
        (tmp_path / f"{name}.model").write_bytes(model.getvalue())
        return SentencePieceVocabulary(tmp_path / f"{name}.model")

    assert tokenizer_files(trained("plain"), model_max_length_tokens=7)
    others = {
        "unigram": {"model_type": "unigram"},
        "nfkc": {"normalization_rule_name": "nmt_nfkc"},
        "prefix": {"add_dummy_prefix": True},
        "spaces": {"remove_extra_whitespaces": True},
        "user": {"user_defined_symbols": ["<|user|>"]},
    }
    for name, options in others.items():
        vocabulary = trained(name, **options)
        with pytest.raises(BadInput, match=rf"no tokenizer\.json can do what \S*{name}\.model"):
            tokenizer_files(vocabulary, model_max_length_tokens=7)


@pytest.mark.filterwarnings("ignore")  # of protobuf
def test_equal_scores_and_pieces_out_of_use_are_refused(vocabularies, tmp_path):
    pytest.importorskip("google.protobuf")
    format = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

    def refuse(message, change):
        model = format.ModelProto.FromString(vocabularies["sentencepiece"].path.read_bytes())
        change([piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1])
        (tmp_path / "v.model").write_bytes(model.SerializeToString())
        vocabulary = SentencePieceVocabulary(tmp_path / "v.model")
        with pytest.raises(BadInput, match=message):
            tokenizer_files(vocabulary, model_max_length_tokens=7)

    def equal_scores(longer):
        longer[-1].score = longer[-2].score

    def out_of_use(longer):
        longer[-1].type = format.ModelProto.SentencePiece.UNUSED

    # Of two pieces with one score SentencePiece takes the leftmost, a tokenizer.json the first of its list.
    refuse("have equal scores", equal_scores)
    refuse(r"no tokenizer\.json can do what \S*v\.model does with '", out_of_use)


def test_changed_or_deleted_since_it_was_opened(vocabularies, tmp_path):
    path = tmp_path / "v.json"
    path.write_bytes(vocabularies["bpe"].path.read_bytes())
    vocabulary = open_vocabulary(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == vocabulary.fingerprint
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(BadInput, match=r"v\.json has changed since it was opened"):
        tokenizer_files(vocabulary, model_max_length_tokens=7)
    path.unlink()
    with pytest.raises(BadInput, match=r"cannot read the vocabulary \S*v\.json"):
        tokenizer_files(vocabulary, model_max_length_tokens=7)


def test_folders_without_a_usable_vocabulary(vocabularies, tmp_path):
    assert find_vocabulary(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_vocabulary(tmp_path) is None

    def refuse(message):
        with pytest.raises(BadInput, match=message) as error:
            find_vocabulary(tmp_path)
        assert "\n" not in str(error.value)

    for name in ("tokenizer_config.json", "merges.txt", "vocab.json"):
        (tmp_path / name).write_text("{}")
        refuse(rf"has .*{name}.* but no tokenizer\.json; make it with AutoTokenizer\.from_pretr")
    bpe = vocabularies["bpe"].path.read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(bpe[:-100])
    refuse(r"tokenizer\.json is not a tokenizer\.json")
    (tmp_path / "tokenizer.json").write_bytes(bpe.replace(b'"<pad>"', b'"[PAD]"'))
    refuse(r"tokenizer\.json has the special ids \(0, 1, 2, None\)")
    (tmp_path / "tokenizer.json").write_bytes(bpe)
    assert find_vocabulary(tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(b"words of a tiktoken file")
    refuse(r"tokenizer\.model is not a SentencePiece model")
    with pytest.raises(BadInput, match="there is no folder"):
        find_vocabulary(tmp_path / "missing")


def test_two_vocabularies_in_one_folder(vocabularies, tmp_path):
    def refuse(message):
        with pytest.raises(BadInput, match=message):
            find_vocabulary(tmp_path)

    write(vocabularies["sentencepiece"], tmp_path)
    ours = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(vocabularies["bpe"].path.read_bytes())
    both = r"tokenizer\.model and \S*tokenizer\.json are different vocabularies"
    refuse(both + r" \(2300 and 2000 tokens\)")
    size = vocabularies["sentencepiece"].size
    other = train_sentencepiece(DOCUMENTS[::-2], tmp_path / "other.model", size)
    files = tokenizer_files(other, model_max_length_tokens=7)
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    refuse(both + r" \(other ids for '")
    (tmp_path / "tokenizer.json").write_bytes(ours[:-100])
    refuse(r"tokenizer\.json is not a tokenizer\.json")
    (tmp_path / "tokenizer.json").write_bytes(ours)
    assert find_vocabulary(tmp_path) == tmp_path / "tokenizer.model"
