"""tasks/seqio_vocabulary.py against the vocabularies it wraps, on text in every language of the demo corpus."""

import pickle
import shutil
import subprocess
import sys

import pytest

from bloomjax import vocabulary
from bloomjax.errors import BadInput
from bloomjax.prepare import import_seqio
from bloomjax.tasks.seqio_vocabulary import seqio_vocabulary
from bloomjax.tasks.text_files import find_languages, read_documents

pytest.importorskip("seqio", reason="needs the extra `data`")

TRICKY = [
    "",
    " ",
    "a\n\tb\u2581 c",
    "1234  5678",
    "</s> <pad>",
    "\u4f60\U0001f600\u0bcd",
    "\ufeffx\r\n",
]


@pytest.fixture(scope="module")
def texts():
    from bloomjax.tasks.demo import CORPUS

    languages = find_languages(CORPUS) | find_languages(CORPUS / "code")
    languages.pop("code", None)
    found = [text for files in languages.values() for text in read_documents(files[0])]
    assert len(languages) == 59 and len(found) > 300
    return found + TRICKY


@pytest.fixture(scope="module", params=[".json", ".model"])
def pair(request, texts, tmp_path_factory):
    """Ours and seqio's."""
    import_seqio()
    path = tmp_path_factory.mktemp("vocabulary") / f"v{request.param}"
    ours = vocabulary.TRAINERS[request.param](texts, path, 3000)
    return ours, seqio_vocabulary(path)


def test_ids_and_texts_are_ours(pair, texts):
    ours, theirs = pair
    assert theirs.vocab_size == 3000 and theirs.extra_ids == 0
    ids = (theirs.unk_id, theirs.bos_id, theirs.eos_id, theirs.pad_id)
    assert ids == (0, 1, 2, 3)
    for text in texts:
        encoded = theirs.encode(text)
        assert encoded == ours.encode(text)
        assert theirs.decode(encoded) == text
        # The end of a document, and what comes after it.
        assert theirs.decode([*encoded, ours.eos_id, *encoded]) == text
    assert theirs.decode([ours.encode("a")[0], 3000, 10**6]) == ours.decode(
        [ours.encode("a")[0], 0, 0]
    )
    import tensorflow as tf

    assert theirs.decode(tf.constant(ours.encode("eager"))) == "eager"


def test_in_tensorflow(pair, texts):
    import tensorflow as tf

    ours, theirs = pair
    some = texts[::23] + TRICKY

    dataset = tf.data.Dataset.from_tensor_slices(some).map(theirs.encode_tf)
    assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
    assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == [ours.encode(x) for x in some]
    back = dataset.map(theirs.decode_tf)
    assert back.element_spec == tf.TensorSpec([], tf.string)
    assert [text.decode() for text in back.as_numpy_iterator()] == some

    ragged = theirs.encode_tf(tf.constant(some))
    assert ragged.dtype == tf.int32 and ragged.to_list() == [ours.encode(x) for x in some]
    rows = ragged.to_tensor(default_value=theirs.eos_id)  # what follows </s> is padding
    assert [text.decode() for text in theirs.decode_tf(rows).numpy()] == some
    assert theirs.decode_tf(rows[None]).shape == [1, len(some)]
    with pytest.raises(ValueError, match="vector of texts"):
        theirs.encode_tf(tf.constant([["a"]]))


def test_a_task_tokenizes_with_it(pair):
    import seqio
    import tensorflow as tf

    ours, theirs = pair
    some = ["One river.", "\u4f60\u597d\n 12"]
    feature = seqio.Feature(theirs, add_eos=True)
    name = f"seqio_vocabulary_test_{ours.path.suffix[1:]}"
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"targets": some}
        ),
        splits=["train"],
    )
    task = seqio.Task(
        name, source, {"targets": feature}, [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    )  # fmt: skip
    found = task.get_dataset(sequence_length=None, split="train", shuffle=False)
    assert [x["targets"].tolist() for x in found.as_numpy_iterator()] == [
        [*ours.encode(text), 2] for text in some
    ]


def test_equal_files_are_equal_vocabularies(pair, tmp_path):
    ours, theirs = pair
    copy = tmp_path / f"copy{ours.path.suffix}"
    shutil.copy(ours.path, copy)
    assert seqio_vocabulary(copy) == theirs and hash(seqio_vocabulary(copy)) == hash(theirs)
    more = seqio_vocabulary(copy, extra_ids=100)
    assert more.vocab_size == 3100 and more != theirs and theirs != ours
    again = pickle.loads(pickle.dumps(more))
    assert again == more and again.encode("river") == ours.encode("river")
    with pytest.raises(BadInput, match="there is no vocabulary"):
        seqio_vocabulary(tmp_path / "missing.json")


def test_importing_it_loads_nothing_heavy():
    program = (
        "import bloomjax.tasks.seqio_vocabulary, sys;"
        "assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
