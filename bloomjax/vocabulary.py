"""Text to token ids and back: one implementation for training, evaluation and export.

Two kinds of vocabulary behind one interface: SentencePiece models (`.model`) read by the Python
`sentencepiece` package, and byte-level BPE (`tokenizer.json`, BLOOM's own) read by `tokenizers`.
Both reproduce any text exactly and reserve the ids BLOOM reserves: 0 `<unk>`, 1 `<s>`, 2 `</s>`,
3 `<pad>`.
"""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from bloomjax.errors import BadInput
from bloomjax.files import write_whole

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

# SentencePiece writes spaces as U+2581, so this one character cannot stand for itself in a piece.
SPACE_MARK = "\u2581"
# Newlines, tabs and the space mark become byte tokens; the trainer must not see them.
_NOT_IN_PIECES = re.compile("[\n\r\t\0\u2581]+")
# The trainer keeps a line in memory as a whole and drops the ones above its limit.
_MAX_TRAINING_LINE_CHARACTERS = 4096
_NUM_FIXED_PIECES = 4 + 256
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
# How BLOOM's tokenizer.json (huggingface.co/bigscience/bloom) cuts a text before pieces are made: a word with the
# space before it, and what is between words. A class within a class: Python's `re` reads it as something else.
_BLOOM_WORD = r" ?[^(\s|[.,!?…。，、।۔،])]+"


class Vocabulary(Protocol):
    """What the trainer, the token store and the decoder need of a vocabulary."""

    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int

    @property
    def path(self) -> Path:
        """The vocabulary file."""
        ...

    @property
    def size(self) -> int:
        """Number of token ids; ids are 0 ... size - 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary file, as 64 hexadecimal digits."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `<s>` and `</s>`."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; `<s>`, `</s>` and `<pad>` vanish."""
        ...


class SentencePieceVocabulary:
    """A SentencePiece model with byte fallback; `decode(encode(text)) == text` for every text.

    Attributes:
      path: the file it was read from.
      fingerprint: SHA-256 of the file, as 64 hexadecimal digits.

    Raises:
      BadInput: the file is missing, is no SentencePiece model, or has other special ids.
    """

    unk_id, bos_id, eos_id, pad_id = UNK_ID, BOS_ID, EOS_ID, PAD_ID

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        data = _read_vocabulary_file(self.path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError, OSError):
            raise BadInput(f"{self.path} is not a SentencePiece model") from None
        model = self._model
        _check_special_ids(
            self.path, model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()
        )
        self._byte_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(map(model.is_byte, self._byte_ids)):
            raise BadInput(
                f"{self.path} has no byte fallback: it would lose the characters it does not know"
            )
        # SentencePiece would make U+2581 and, where no piece stands for a space, the space the same bytes.
        has_space = model.piece_to_id(SPACE_MARK) != UNK_ID
        self._not_for_the_model = re.compile(
            f"({SPACE_MARK})" if has_space else f"([ {SPACE_MARK}])"
        )

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `<s>` and `</s>`."""
        first, *rest = self._not_for_the_model.split(text)
        ids = self._model.encode(first)
        for character, part in zip(rest[::2], rest[1::2], strict=True):
            ids += [self._byte_ids[byte] for byte in character.encode()]
            ids += self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        if any(map(self._not_for_the_model.search, texts)):
            return [self.encode(text) for text in texts]
        return self._model.encode(list(texts), num_threads=-1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; invalid UTF-8 from byte tokens becomes U+FFFD, padding rows of a model vanish."""
        return self._model.decode([i for i in map(int, ids) if i < self.size])


class ByteLevelBPEVocabulary:
    """Byte-level BPE in a Hugging Face `tokenizer.json`, such as BLOOM's own.

    Special tokens written out in a text (`</s>`) are encoded as ordinary text.

    Attributes:
      path: the file it was read from.
      fingerprint: SHA-256 of the file, as 64 hexadecimal digits.

    Raises:
      BadInput: the file is missing, is no tokenizer.json, or has other special ids.
    """

    unk_id, bos_id, eos_id, pad_id = UNK_ID, BOS_ID, EOS_ID, PAD_ID

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        data = _read_vocabulary_file(self.path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # tokenizers raises bare Exception
            raise BadInput(f"{self.path} is not a tokenizer.json: {_one_line(error)}") from None
        found = (self._tokenizer.token_to_id(name) for name in SPECIAL_TOKENS)
        _check_special_ids(self.path, *found)
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included, and ids in between that name nothing."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `<s>` and `</s>`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens vanish, invalid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def open_vocabulary(
    path: str | os.PathLike[str],
) -> SentencePieceVocabulary | ByteLevelBPEVocabulary:
    """Opens a SentencePiece `.model` or a `tokenizer.json`, by the name of the file.

    Raises:
      BadInput: the name has neither ending, or the file cannot be used.
    """
    suffix = Path(path).suffix
    if suffix == ".model":
        return SentencePieceVocabulary(path)
    if suffix == ".json":
        return ByteLevelBPEVocabulary(path)
    raise BadInput(
        f"{path} is no vocabulary: expected a SentencePiece file *.model or a tokenizer.json"
    )


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    character_coverage: float = 0.9995,
    num_threads: int = 4,
) -> SentencePieceVocabulary:
    """Trains a SentencePiece BPE vocabulary on `texts`, writes it to `path` and opens it.

    The same texts give the same bytes. Nothing is normalised, digits stand alone, runs of spaces
    may be one piece, and whatever has no piece (rare characters, newlines, tabs) becomes bytes.
    BPE rather than unigram: `tokenizers` then segments an exported model identically.

    Args:
      texts: documents; all of them are held in memory by the trainer.
      path: the `.model` file to write; it must not exist.
      vocab_size: number of token ids, the 4 special ids and 256 bytes included.
      character_coverage: share of the characters of the text that get a piece of their own.
      num_threads: threads of the trainer.

    Raises:
      BadInput: the file exists, there is no text, or `vocab_size` does not suit the text.
    """
    path = Path(path)
    check_new_vocabulary(path, ".model", vocab_size)
    lines = _not_empty(_training_lines(texts), path)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=character_coverage,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            max_sentence_length=8 * _MAX_TRAINING_LINE_CHARACTERS,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _bad_vocab_size(vocab_size, error) from None
    write_whole(path, model.getvalue())
    return SentencePieceVocabulary(path)


def train_byte_level_bpe(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int
) -> ByteLevelBPEVocabulary:
    """Trains a byte-level BPE vocabulary as BLOOM's, writes it to `path` and opens it.

    The same texts give the same bytes. Nothing is normalised; a piece is part of one word with the
    space before it, or of what is between words.

    Args:
      texts: documents; the trainer holds their distinct words in memory.
      path: the `.json` file to write; it must not exist.
      vocab_size: number of token ids, the 4 special ids and 256 bytes included.

    Raises:
      BadInput: the file exists, there is no text, or too little for `vocab_size` tokens.
    """
    path = Path(path)
    check_new_vocabulary(path, ".json", vocab_size)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(_BLOOM_WORD), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_not_empty((text for text in texts if text), path), trainer)
    num_tokens = tokenizer.get_vocab_size()
    if num_tokens < vocab_size:
        raise _too_large(vocab_size, num_tokens)
    write_whole(path, tokenizer.to_str(pretty=True).encode())
    return ByteLevelBPEVocabulary(path)


# By the ending of the file, as `open_vocabulary` tells them apart.
TRAINERS = {".model": train_sentencepiece, ".json": train_byte_level_bpe}


def check_new_vocabulary(path: Path, suffix: str, vocab_size: int) -> None:
    """Raises BadInput where the trainer for `suffix` would before it reads any text."""
    if path.suffix != suffix:
        kind = {".model": "SentencePiece", ".json": "byte-level BPE"}[suffix]
        raise BadInput(f"the name of a {kind} vocabulary must end in {suffix}: {path}")
    if vocab_size <= _NUM_FIXED_PIECES:
        raise BadInput(
            f"VOCAB_SIZE {vocab_size} is too small: 4 special tokens and 256 bytes come first"
        )
    if path.exists():
        raise BadInput(f"{path} exists already and is not overwritten")


def _not_empty(texts: Iterator[str], path: Path) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise BadInput(f"there is no text to train the vocabulary {path} on")
    return itertools.chain([first], texts)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _NOT_IN_PIECES.split(text):
            for start in range(0, len(line), _MAX_TRAINING_LINE_CHARACTERS):
                yield line[start : start + _MAX_TRAINING_LINE_CHARACTERS]


def _bad_vocab_size(vocab_size: int, error: Exception) -> BadInput:
    message = _one_line(error)
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        return _too_large(vocab_size, int(largest.group(1)))
    smallest = re.search(r"(\d+) vs (\d+)", message)
    if smallest and "required_chars" in message:
        num_required = max(int(smallest.group(1)), int(smallest.group(2)))
        return BadInput(
            f"VOCAB_SIZE {vocab_size} is too small for this text: its characters, "
            f"the 256 bytes and the special tokens need {num_required}"
        )
    return BadInput(f"no vocabulary of {vocab_size} pieces can be made of this text: {message}")


def _too_large(vocab_size: int, largest: int) -> BadInput:
    return BadInput(
        f"VOCAB_SIZE {vocab_size} is too large for this text: "
        f"at most {largest} pieces can be made of it"
    )


def _check_special_ids(path: Path, *found: int | None) -> None:
    expected = (UNK_ID, BOS_ID, EOS_ID, PAD_ID)
    if found != expected:
        raise BadInput(
            f"{path} has the special ids {found} for <unk>, <s>, </s>, <pad>; needed are {expected}"
        )


def _read_vocabulary_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise BadInput(f"there is no vocabulary {path}: no such folder") from None
        there = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".model", ".json"))
        found = ", ".join(there[:10]) or "no .model and no .json file"
        raise BadInput(f"there is no vocabulary {path}; {path.parent} has: {found}") from None
    except OSError as error:
        raise BadInput(f"cannot read the vocabulary {path}: {error.strerror}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
