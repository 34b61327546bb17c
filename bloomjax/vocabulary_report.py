"""How well a vocabulary fits a language: tokens per word, bytes per token, characters that it breaks.

Numbers only, counted on text. A word is a maximal run of Unicode letters, marks and numbers; the joiners U+200C and
U+200D do not end one, punctuation, symbols and spaces do. Where words are not set apart (Han, kana, Thai, Lao, Burmese,
Khmer) no dictionary is used: there each letter, with the marks after it, counts as a word. Tokens per word of such a
language are tokens per character and compare with themselves only, between two vocabularies.
"""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from bloomjax.errors import BadInput
from bloomjax.vocabulary import SentencePieceVocabulary, Vocabulary

_DOCUMENTS_PER_BATCH = 256
# Scripts without spaces between words (Unicode standard annex 29, which leaves all but Han and kana to dictionaries).
_UNSPACED_RANGES = (
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # marks of repetition and zero among Han
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_UNSPACED, _SPACED, _MARK = "unspaced", "spaced", "mark"
_SPACE_MARK = "\u2581"


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a vocabulary makes of some documents; counts add up with `+`.

    Attributes:
      num_documents, num_bytes (UTF-8), num_characters (code points): of the text.
      num_words: as the module says.
      num_unspaced_words: those of them that are a single letter of a script without spaces.
      num_tokens: without any `</s>`.
      num_byte_tokens: tokens that stand for one byte because there was no piece (SentencePiece only; newline and tab,
        which never have one, are among them).
      num_broken_characters: characters of which no token holds all bytes.
    """

    num_documents: int = 0
    num_bytes: int = 0
    num_characters: int = 0
    num_words: int = 0
    num_unspaced_words: int = 0
    num_tokens: int = 0
    num_byte_tokens: int = 0
    num_broken_characters: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*map(sum, pairs))

    @property
    def bytes_per_token(self) -> float | None:
        return _ratio(self.num_bytes, self.num_tokens)

    @property
    def tokens_per_word(self) -> float | None:
        """Fertility; None for text without a word."""
        return _ratio(self.num_tokens, self.num_words)

    @property
    def unknown_rate(self) -> float | None:
        """Share of the characters that the vocabulary does not know: no token holds all of their bytes."""
        return _ratio(self.num_broken_characters, self.num_characters)

    @property
    def byte_token_rate(self) -> float | None:
        """Share of the tokens that are single bytes for want of a piece."""
        return _ratio(self.num_byte_tokens, self.num_tokens)

    @property
    def words_are_characters(self) -> bool:
        """Whether most words are single letters of a script without spaces."""
        return 2 * self.num_unspaced_words > self.num_words


def count_words(text: str) -> tuple[int, int]:
    """Words of `text`, and how many of them are single letters of a script without spaces."""
    found = _word_pattern().findall(text)
    return len(found), sum(map(bool, found))


class Meter:
    """Counts what a vocabulary makes of text.

    Attributes:
      vocabulary: the one measured.
      token_bytes: how many bytes of text each id stands for, int32 [size]; 0 for special tokens.
      byte_ids: bool [size], which ids are single bytes for want of a piece; all False for byte-level BPE, whose pieces
        are made of bytes from the beginning.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.byte_ids = np.zeros(vocabulary.size, bool)
        if isinstance(vocabulary, SentencePieceVocabulary):
            model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.path))
            self.byte_ids[:] = [model.is_byte(i) for i in range(vocabulary.size)]
            lengths = (_piece_bytes(model, i) for i in range(vocabulary.size))
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary.path))
            added = tokenizer.get_added_tokens_decoder()
            lengths = (_bpe_bytes(tokenizer, added, i) for i in range(vocabulary.size))
        self.token_bytes = np.fromiter(lengths, np.int32, vocabulary.size)

    def count(self, texts: Sequence[str]) -> Counts:
        """Counts over documents. BadInput where the tokens do not stand for the bytes of the text, one for one."""
        counts = Counts(num_documents=len(texts))
        for text, ids in zip(texts, self.vocabulary.encode_batch(texts), strict=True):
            counts += self._count_one(text, np.array(ids, np.int64))
        return counts

    def _count_one(self, text: str, ids: np.ndarray) -> Counts:
        data = np.frombuffer(text.encode(), np.uint8)
        ends = np.cumsum(self.token_bytes[ids])
        if (ends[-1] if len(ends) else 0) != len(data):
            raise BadInput(
                f"{self.vocabulary.path} does not keep the text as it is (its tokens stand for another number of "
                f"bytes): {text[:40]!r}..."
            )
        starts_character = (data & 0xC0) != 0x80
        number = np.cumsum(starts_character) - 1  # of the character each byte belongs to
        cuts = ends[ends < len(data)]
        broken = np.unique(number[cuts[~starts_character[cuts]]])
        num_words, num_unspaced_words = count_words(text)
        return Counts(
            num_documents=0,
            num_bytes=len(data),
            num_characters=len(text),
            num_words=num_words,
            num_unspaced_words=num_unspaced_words,
            num_tokens=len(ids),
            num_byte_tokens=int(self.byte_ids[ids].sum()),
            num_broken_characters=len(broken),
        )


def measure(texts: Iterable[str], meters: Sequence[Meter]) -> list[Counts]:
    """Counts of each meter over the same documents, which are read once and never held together."""
    counts = [Counts()] * len(meters)
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        counts = [total + meter.count(batch) for total, meter in zip(counts, meters, strict=True)]
    return counts


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _piece_bytes(model: Any, i: int) -> int:
    if model.is_byte(i):
        return 1
    if model.is_control(i) or model.is_unknown(i):
        return 0
    return len(model.id_to_piece(i).replace(_SPACE_MARK, " ").encode())


def _bpe_bytes(tokenizer: tokenizers.Tokenizer, added: dict[int, Any], i: int) -> int:
    if i in added:
        return 0 if added[i].special else len(added[i].content.encode())
    piece = tokenizer.id_to_token(i)
    return 0 if piece is None else len(piece)  # the byte-level alphabet has one character a byte


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Matches a word; its group is the letter where a letter is a word."""
    ranges: dict[str, list[list[int]]] = {_UNSPACED: [], _SPACED: [], _MARK: []}
    unspaced = {i for first, last in _UNSPACED_RANGES for i in range(first, last + 1)}
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category[0] == "M":
            kinds = (_MARK, _SPACED)
        elif code in unspaced and (category[0] == "L" or category == "Nl"):
            kinds = (_UNSPACED,)
        elif category[0] in "LN":
            kinds = (_SPACED,)
        else:
            continue
        for kind in kinds:
            if ranges[kind] and ranges[kind][-1][1] == code - 1:
                ranges[kind][-1][1] = code
            else:
                ranges[kind].append([code, code])
    classes = {
        kind: "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in found)
        for kind, found in ranges.items()
    }
    marks, spaced = classes[_MARK], classes[_SPACED]
    return re.compile(f"([{classes[_UNSPACED]}])[{marks}]*|[{spaced}][{spaced}\u200c\u200d]*")
