"""The tokenizer files of a Hugging Face folder, from our vocabulary and back to it.

    tokenizer.json          what transformers reads
    tokenizer_config.json   names of the special tokens, padding on the left, no cleaning-up of spaces
    tokenizer.model         a SentencePiece vocabulary as it is, so that it comes back unchanged

A byte-level BPE is a tokenizer.json already. A SentencePiece model becomes one here; loading that
needs transformers 4.45 or later, since merges of pieces with spaces are written as pairs.
"""

import hashlib
import json
import os
from pathlib import Path

import sentencepiece
import tokenizers

from bloomjax.errors import BadInput
from bloomjax.vocabulary import (
    SPACE_MARK,
    SPECIAL_TOKENS,
    SentencePieceVocabulary,
    Vocabulary,
    open_vocabulary,
)

# Of a folder that a person would call one with a tokenizer, and from which tokenizer.json can be made.
_OTHER_TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer_config.json",
)  # fmt: skip
# What two tokenizers must agree on: scripts, spaces, control characters, ties between merges, our space mark.
_SAMPLES = (
    "The river was high in spring, and the boats stayed at the quay until the 21st of May 1987.",
    "Le fleuve était haut; les bateaux restaient à quai jusqu'en mai. ¿Cuándo? Àwọn ọmọ kò sí.",
    "नदी वसंत में ऊँची थी। নদী বসন্তে উঁচু ছিল। நதி உயரமாக இருந்தது. നദി നിറഞ്ഞിരുന്നു.",
    "春天河水很高，船一直停在码头，直到五月。川は春に高かった。강은 봄에 높았다.",
    "كان النهر مرتفعا في الربيع، وبقيت القوارب. دریا بہار میں بلند تھا۔ Река была высокой.",
    "def mean(values: list[float]) -> float:\n\treturn sum(values) / len(values)  # 0.5\r\n\n\n",
    "  two, then      six spaces   ",
    "aaaaa abababa hahahahaha ........ !!! ------- ((((())))) 1000000 \n \n  \n   \n",
    "\u2581a\u2581\u2581 b\u2581 \0 \a \u00a0\u2028\u3000\ufeff\ufffd e\u0301 \u00e9 \ufb01 \uff12 \u2460 \u2047",
    "\U0001f600\U0001f469\u200d\U0001f680 \U00012000 \ue000 \U0010ffff",
)


def tokenizer_files(vocabulary: Vocabulary, *, model_max_length_tokens: int) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder, by name.

    transformers.AutoTokenizer then gives the ids and the text of `vocabulary.encode` and `decode`
    for every text. It takes special tokens that are written out in a text, such as "</s>", for
    what they name, unless it is told `split_special_tokens=True`.

    Args:
      vocabulary: a SentencePieceVocabulary or a ByteLevelBPEVocabulary.
      model_max_length_tokens: length above which transformers warns.

    Raises:
      BadInput: the file has changed since `vocabulary` was opened, or it is a SentencePiece model
        that a tokenizer.json cannot reproduce, such as a unigram or a normalising one.
    """
    data = _read(vocabulary.path)
    if hashlib.sha256(data).hexdigest() != vocabulary.fingerprint:
        raise BadInput(f"{vocabulary.path} has changed since it was opened")
    config = _json({
        # Not BloomTokenizerFast, which BLOOM names: transformers 5 has no such class and takes this one instead,
        # and the defaults that it adds in transformers 4 are all written here.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # BLOOM takes no token_type_ids
        "model_max_length": model_max_length_tokens,
    })  # fmt: skip
    if not isinstance(vocabulary, SentencePieceVocabulary):
        return {"tokenizer.json": data, "tokenizer_config.json": config}
    tokenizer_json = _from_sentencepiece(data, vocabulary).to_str(pretty=True).encode()
    return {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": config,
        "tokenizer.model": data,
    }


def find_vocabulary(folder: Path) -> Path | None:
    """The file of a Hugging Face folder to open as our vocabulary; None if it has no tokenizer.

    tokenizer.model, which is what `tokenizer_files` was given, comes before tokenizer.json.

    Raises:
      BadInput: there is no such folder; a file is damaged or has other special ids; the two are
        different vocabularies; there is a tokenizer, but neither of these files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    model, tokenizer_json = folder / "tokenizer.model", folder / "tokenizer.json"
    if os.path.lexists(model):
        ours = open_vocabulary(model)
        if os.path.lexists(tokenizer_json):
            _check_same(ours, open_vocabulary(tokenizer_json))
        return model
    if os.path.lexists(tokenizer_json):
        open_vocabulary(tokenizer_json)
        return tokenizer_json
    if there := [name for name in _OTHER_TOKENIZER_FILES if (folder / name).exists()]:
        raise BadInput(
            f"{folder} has {', '.join(there)} but no tokenizer.json; make it with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return None


def _check_same(ours: Vocabulary, theirs: Vocabulary) -> None:
    difference = ""
    if ours.size != theirs.size:
        difference = f"{ours.size} and {theirs.size} tokens"
    for text in _SAMPLES:
        if not difference and ours.encode(text) != theirs.encode(text):
            difference = f"other ids for {text[:40]!r}"
    if difference:
        raise BadInput(
            f"{ours.path} and {theirs.path} are different vocabularies ({difference}); "
            f"delete the one the model was not trained with"
        )


def _from_sentencepiece(data: bytes, ours: SentencePieceVocabulary) -> tokenizers.Tokenizer:
    """The model `data` for the `tokenizers` library, with spaces where SentencePiece has U+2581.

    So U+2581 itself is in no piece and falls to bytes, as in `SentencePieceVocabulary.encode`, and
    the text needs neither a normaliser nor words.

    SentencePiece joins the two neighbours whose piece has the best score, the leftmost of equals.
    `tokenizers` has a rank for each pair of neighbours instead. All ways to cut a piece in two get
    consecutive ranks, in the order of the scores of the pieces. In what order does not matter,
    because only one of them ever occurs: where neither half has grown beyond the piece, all that
    happened inside it is what happens to the piece alone, and that passes through one state of two
    halves.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [model.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(model.vocab_size())]
    scores = {
        piece: model.get_score(i)
        for i, piece in enumerate(pieces)
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
    }
    longer = sorted((piece for piece in scores if len(piece) > 1), key=lambda p: -scores[p])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    ids = {piece: i for i, piece in enumerate(pieces)}
    bpe = tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = tokenizers.decoders.ByteFallback()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.encode_special_tokens = True  # here, not in the file: a piece may look like one
    # Unigram models, normalisers, a space put in front, pieces out of use: each shows in one of these.
    texts = [*_SAMPLES, *pieces]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    expected = ours.encode_batch(texts)
    for text, encoding, right in zip(texts, encodings, expected, strict=True):
        if encoding.ids != right or tokenizer.decode(right) != text:
            raise BadInput(f"no tokenizer.json can do what {ours.path} does with {text[:40]!r}")
    # Of equals the leftmost comes first, whichever piece it makes. (A user's own symbols score as the first merge.)
    if len({scores[piece] for piece in longer}) < len(longer):
        raise BadInput(f"no tokenizer.json can do what {ours.path} does: pieces have equal scores")
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read the vocabulary {path}: {error.strerror}") from None


def _json(values: dict[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
