"""seqio Vocabularies of the vocabularies a run trains with, for Tasks and evaluations written against seqio.

    feature = seqio.Feature(seqio_vocabulary("runs/demo/vocabulary.model"), add_eos=True)

Encoding goes through `sentencepiece` or `tokenizers`, never through TensorFlow's own SentencePiece, which cuts some
texts differently; so `encode_tf` calls back into Python and belongs into pipelines that run once, not into a training
loop. The trainer itself reads token stores.
"""

import functools
import os
from typing import Any

from bloomjax.vocabulary import open_vocabulary


def seqio_vocabulary(path: str | os.PathLike[str], extra_ids: int = 0) -> Any:
    """The vocabulary at `path` as a seqio.Vocabulary.

    Ids and texts are those of `bloomjax.vocabulary`; ids 0-3 are <unk>, <s>, </s>, <pad>, so padding is 3 where seqio's
    default is 0. As everywhere in seqio, `decode` ends at the first </s> and takes ids beyond the vocabulary for <unk>.
    Equal for equal files, wherever they lie; it can be pickled.

    Args:
      path: a SentencePiece *.model or a tokenizer.json.
      extra_ids: ids above the vocabulary that a seqio preprocessor wants for itself.

    Raises:
      BadInput: as `open_vocabulary`.
    """
    return _adapter()(path, extra_ids)


@functools.cache
def _adapter() -> type:
    import seqio
    import tensorflow as tf

    class Adapter(seqio.Vocabulary):
        """A bloomjax vocabulary behind seqio's interface."""

        def __init__(self, path: str | os.PathLike[str], extra_ids: int):
            super().__init__(extra_ids)
            self.vocabulary = open_vocabulary(path)

        def __reduce__(self) -> Any:  # the class has no importable name
            return seqio_vocabulary, (os.fspath(self.vocabulary.path), self.extra_ids)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Adapter) and self._key() == other._key()

        def __hash__(self) -> int:
            return hash(self._key())

        def _key(self) -> tuple[str, int]:
            return self.vocabulary.fingerprint, self.extra_ids

        @property
        def bos_id(self) -> int:
            return self.vocabulary.bos_id

        @property
        def eos_id(self) -> int:
            return self.vocabulary.eos_id

        @property
        def pad_id(self) -> int:
            return self.vocabulary.pad_id

        @property
        def unk_id(self) -> int:
            return self.vocabulary.unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self.vocabulary.size

        def _encode(self, s: str) -> list[int]:
            return self.vocabulary.encode(s)

        def _decode(self, ids: Any) -> str:
            return self.vocabulary.decode(ids)

        def _encode_tf(self, s: Any) -> Any:
            """int32 [tokens] of a scalar; a RaggedTensor int32 [texts, tokens] of a vector of texts."""

            def encode(texts: Any) -> tuple[Any, Any]:
                found = [self.vocabulary.encode(text.decode()) for text in texts.numpy().tolist()]
                flat = [token for ids in found for token in ids]
                return tf.constant(flat, tf.int32), tf.constant(list(map(len, found)), tf.int32)

            s = tf.convert_to_tensor(s)
            if s.shape.rank not in (0, 1):
                raise ValueError(f"encode_tf takes a text or a vector of texts, got {s.shape}")
            ids, lengths = tf.py_function(encode, [tf.reshape(s, [-1])], (tf.int32, tf.int32))
            ids.set_shape([None])
            lengths.set_shape([None])
            if s.shape.rank == 0:
                return ids
            return tf.RaggedTensor.from_row_lengths(ids, lengths)  # pyright: ignore

        def _decode_tf(self, ids: Any) -> Any:
            """A text of int32 [tokens]; texts [...] of int32 [..., tokens]."""

            def decode(rows: Any) -> Any:
                return tf.constant([self.vocabulary.decode(row) for row in rows.numpy()], tf.string)

            shape = tf.shape(ids)
            rows = tf.reshape(ids, [tf.reduce_prod(shape[:-1]), shape[-1]])
            texts = tf.py_function(decode, [rows], tf.string)
            texts.set_shape([None])
            texts = tf.reshape(texts, shape[:-1])
            texts.set_shape(ids.shape[:-1])
            return texts

    return Adapter
