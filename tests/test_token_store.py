"""The token store against plain numpy, and against damage of every kind."""

import concurrent.futures
import itertools
import json
import shutil
import time

import numpy as np
import pytest
import tensorstore

from bloomjax import kvstores, token_store
from bloomjax.errors import BadInput
from bloomjax.token_store import SourceFile, TokenStore, build_store, write_language, write_store


class ByteVocabulary:
    """Bytes, after the four special ids."""

    unk_id, bos_id, eos_id, pad_id = 0, 1, 2, 3
    size = 260
    fingerprint = "f" * 64

    def encode(self, text):
        return [byte + 4 for byte in text.encode()]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(int(i) - 4 for i in ids if i > 3).decode()


VOCABULARY = ByteVocabulary()


def make_documents(num_documents, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [
        "".join(map(chr, rng.integers(0x20, 0x250, rng.integers(1, longest))))
        for _ in range(num_documents)
    ]


def plain_tokens(documents):
    """Independent of the store: every document and </s>, end to end."""
    return np.array(
        list(itertools.chain.from_iterable([*VOCABULARY.encode(d), 2] for d in documents)),
        np.uint32,
    )


@pytest.fixture
def small_files(monkeypatch):
    """Chunks of 64 tokens and files of 256, so that little text fills many."""
    monkeypatch.setattr(token_store, "_CHUNK_BYTES", 256)
    monkeypatch.setattr(token_store, "_SHARD_BYTES", 1024)


@pytest.mark.parametrize("num_documents", [2, 3, 20, 117])
def test_tokens_are_those_of_the_documents(tmp_path, small_files, num_documents):
    documents = make_documents(num_documents)
    store = write_store(tmp_path / "store", {"xx": documents}, VOCABULARY)
    num_held_out = max(1, round(0.05 * num_documents))
    parts = {"train": documents[:-num_held_out], "validation": documents[-num_held_out:]}
    for split, part in parts.items():
        expected = plain_tokens(part)
        assert store.num_documents("xx", split) == len(part)
        assert store.num_tokens("xx", split) == len(expected)
        tokens = store.read("xx", split, 0, len(expected))
        assert tokens.dtype == np.uint32
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(
            store.read_document_ends("xx", split), np.flatnonzero(expected == 2) + 1
        )
        middle = len(expected) // 3
        np.testing.assert_array_equal(
            store.read("xx", split, middle, 2 * middle), expected[middle : 2 * middle]
        )
        entry = store.manifest["languages"]["xx"]["splits"][split]
        assert entry["num_bytes"] == len("".join(part).encode())
    store.verify()


def test_exact_multiples_of_a_file(tmp_path, small_files):
    for num_tokens in (63, 64, 65, 255, 256, 257, 512, 513):
        documents = ["a" * (num_tokens - 1), "b"]
        store = write_store(tmp_path / str(num_tokens), {"xx": documents}, VOCABULARY)
        np.testing.assert_array_equal(
            store.read("xx", "train", 0, num_tokens), plain_tokens(documents[:1])
        )
        store.verify()


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 300])
def test_windows_are_slices(tmp_path, small_files, sequence_length):
    store = write_store(tmp_path / "store", {"xx": make_documents(300)}, VOCABULARY)
    tokens = plain_tokens(make_documents(300)[:285]).astype(np.int32)
    num_windows = store.num_windows("xx", "train", sequence_length)
    # The last window has all of its sequence_length + 1 tokens, one more would not.
    assert num_windows * sequence_length + 1 <= len(tokens)
    assert (num_windows + 1) * sequence_length + 1 > len(tokens)
    windows = np.random.default_rng(1).integers(0, num_windows, 600)
    windows[:2] = 0, num_windows - 1
    got = store.read_windows("xx", "train", windows, sequence_length)
    assert got.dtype == np.int32
    expected = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)
    np.testing.assert_array_equal(got, expected[windows * sequence_length])
    empty = store.read_windows("xx", "train", np.array([], np.int64), sequence_length)
    assert empty.shape == (0, sequence_length + 1)
    for wrong in (-1, num_windows):
        with pytest.raises(IndexError, match=f"has {num_windows} windows"):
            store.read_windows("xx", "train", np.array([0, wrong]), sequence_length)


def test_one_token_too_few_for_a_window(tmp_path):
    store = write_store(tmp_path / "store", {"xx": ["abc", "d"]}, VOCABULARY)
    assert store.num_tokens("xx", "train") == 4
    assert [store.num_windows("xx", "train", length) for length in (1, 2, 3, 4)] == [3, 1, 1, 0]


def test_holdout_fraction(tmp_path):
    assert token_store.num_holdout_documents(1000, 0.05) == 50
    assert token_store.num_holdout_documents(1000, 0.0) == 1
    assert token_store.num_holdout_documents(2, 0.99) == 1
    documents = {"xx": make_documents(10)}
    store = write_store(tmp_path / "store", documents, VOCABULARY, holdout_fraction=0.3)
    assert store.num_documents("xx", "validation") == 3
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(BadInput, match="held-out fraction"):
            write_store(tmp_path / "other", documents, VOCABULARY, holdout_fraction=fraction)


def test_blank_documents_are_skipped_and_counted(tmp_path):
    documents = ["one", " \n\t", "two", "", "\u3000", "three"]
    store = write_store(tmp_path / "store", {"xx": documents}, VOCABULARY)
    assert store.manifest["languages"]["xx"]["num_skipped_documents"] == 3
    np.testing.assert_array_equal(store.read("xx", "train", 0, 8), plain_tokens(["one", "two"]))


def test_file_holds_plain_little_endian_numbers(tmp_path):
    write_store(tmp_path / "store", {"xx": ["abc", "de", "f"]}, VOCABULARY)
    data = (tmp_path / "store/xx/train/tokens/c/0").read_bytes()
    expected = plain_tokens(["abc", "de"])
    np.testing.assert_array_equal(np.frombuffer(data, "<u4", len(expected)), expected)
    # Nothing is padded: tokens, their crc32c, and an index of one entry with its own.
    assert len(data) == 4 * len(expected) + 4 + 16 + 4


def test_fingerprint_is_of_the_content(tmp_path):
    def fingerprint(name, documents, path="a.txt", digest="0" * 64):
        with build_store(tmp_path / name) as root:
            sources = [SourceFile(path, 5, digest)]
            entry = write_language(root, "xx", documents, VOCABULARY, sources=sources)
            told = token_store.write_manifest(root, {"xx": entry}, VOCABULARY)
        assert TokenStore(tmp_path / name).fingerprint == told
        return told

    first = fingerprint("1", ["one", "two"])
    assert fingerprint("2", ["one", "two"], path="elsewhere/b.txt") == first
    assert fingerprint("3", ["one", "twO"]) != first
    assert fingerprint("4", ["one", "two"], digest="1" * 64) != first
    one, two = ((tmp_path / n / "xx/train/tokens/c/0").read_bytes() for n in "12")
    assert one == two


def test_source_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    source = SourceFile.of(tmp_path / "a.txt")
    # FIPS 180-2, appendix B.1.
    assert source.sha256.startswith(
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert source.num_bytes == 3
    with pytest.raises(BadInput, match="cannot read .*missing.txt: No such file"):
        SourceFile.of(tmp_path / "missing.txt")


def test_refuses_bad_languages(tmp_path):
    for label in ("", "a b", "a/b", "..", "é"):
        with pytest.raises(BadInput, match="no language label"):
            write_language(tmp_path, label, ["a", "b"], VOCABULARY)
    for documents in ([], ["one"], ["one", "  "]):
        with pytest.raises(BadInput, match="'xx' has . documents"):
            write_language(tmp_path, "xx", documents, VOCABULARY)
    for announced in (3, 5):
        with pytest.raises(BadInput, match="changed meanwhile"):
            write_language(
                tmp_path, "xx", ["a", "b", "c", "d"], VOCABULARY, num_documents=announced
            )


def test_announced_number_gives_the_same_store(tmp_path):
    documents = make_documents(600)
    with build_store(tmp_path / "1") as root:
        entry = write_language(root, "xx", iter(documents), VOCABULARY, num_documents=600)
        token_store.write_manifest(root, {"xx": entry}, VOCABULARY)
    write_store(tmp_path / "2", {"xx": documents}, VOCABULARY)
    assert TokenStore(tmp_path / "1").manifest == TokenStore(tmp_path / "2").manifest


def test_failure_leaves_nothing(tmp_path):
    def documents():
        yield "one"
        yield "two"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), build_store(tmp_path / "store") as root:
        write_language(root, "xx", documents(), VOCABULARY, num_documents=9)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="write_manifest"), build_store(tmp_path / "store"):
        pass
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "precious").write_text("data")
    for path in (store, store / "precious", tmp_path / "store" / "precious" / "below"):
        with pytest.raises(BadInput, match="not overwritten|cannot write beside"):
            write_store(path, {"xx": ["a", "b"]}, VOCABULARY)
    assert (store / "precious").read_text() == "data"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["precious", "store"]
    with pytest.raises(BadInput, match=f"file://{store} exists already|{store} exists already"):
        write_store(f"file://{store}", {"xx": ["a", "b"]}, VOCABULARY)
    (tmp_path / "empty").mkdir()
    write_store(tmp_path / "empty", {"xx": ["a", "b"]}, VOCABULARY).verify()


def test_failed_writes_name_the_array(tmp_path):
    (tmp_path / "xx").write_text("a file where a folder should be")
    with pytest.raises(BadInput, match="cannot write xx/train/"):
        write_language(tmp_path, "xx", ["a", "b"], VOCABULARY)


def test_urls(tmp_path):
    write_store(f"file://{tmp_path}/store", {"xx": ["one", "two"]}, VOCABULARY)
    store = TokenStore(f"file://{tmp_path}/store")
    np.testing.assert_array_equal(store.read("xx", "train", 0, 4), plain_tokens(["one"]))
    store.verify()
    assert token_store.store_exists(f"file://{tmp_path}/store")
    assert not token_store.store_exists(f"file://{tmp_path}/other")
    with pytest.raises(BadInput, match="cannot open nonsense://x"):
        TokenStore("nonsense://x")


def test_storage_without_folders():
    """memory:// takes the way of gs:// and s3://, which nothing here can reach: no renaming, no listing."""
    url = f"memory://bucket{time.monotonic_ns()}/below/store/"
    assert not token_store.store_exists(url)
    documents = {"xx": make_documents(50), "yy": ["one", "two"]}
    store = write_store(url, documents, VOCABULARY)
    store.verify()
    expected = plain_tokens(documents["xx"][:-2])
    np.testing.assert_array_equal(store.read("xx", "train", 0, len(expected)), expected)
    with pytest.raises(BadInput, match="memory://.* exists already and is not overwritten"):
        write_store(url, documents, VOCABULARY)
    kvstore = tensorstore.KvStore.open(url, context=kvstores.STORAGE).result()
    key = "xx/train/tokens/c/0"
    data = bytearray(kvstore.read(key).result().value)
    data[5] ^= 1
    kvstore.write(key, bytes(data)).result()
    with pytest.raises(
        BadInput,
        match="xx train tokens 0 to 1024 cannot be read: DATA_LOSS",  # the first chunk
    ):
        TokenStore(url).verify()
    kvstore.delete_range(tensorstore.KvStore.KeyRange("manifest.json", "manifest.jsoo")).result()
    with pytest.raises(BadInput, match=r"memory://.* is no token store: it has no manifest\.json"):
        TokenStore(url)
    for url, driver in (("gs://bucket/a/b", "gcs"), ("s3://bucket/a/b", "s3")):
        spec = tensorstore.KvStore.Spec(kvstores.kvstore(url, "xx/train/tokens")).to_json()
        assert spec == {"driver": driver, "bucket": "bucket", "path": "a/b/xx/train/tokens/"}


@pytest.mark.parametrize("num_documents", [2, 3, 500])
def test_document_of_a_token(tmp_path, small_files, num_documents):
    documents = make_documents(num_documents)
    store = write_store(tmp_path / "store", {"xx": documents}, VOCABULARY)
    for split in ("train", "validation"):
        num_tokens = store.num_tokens("xx", split)
        starts = np.flatnonzero(np.r_[2, store.read("xx", split, 0, num_tokens)[:-1]] == 2)
        tokens = range(0, num_tokens, 1 if num_documents < 9 else 37)
        for token in {*tokens, num_tokens - 1}:
            document = int(np.searchsorted(starts, token, "right")) - 1
            assert store.document_of("xx", split, token) == (document, starts[document])
        for token in (-1, num_tokens):
            with pytest.raises(IndexError, match=f"token {token} of {num_tokens} of xx {split}"):
                store.document_of("xx", split, token)
    file = tmp_path / "store/xx/train/document_ends/c/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 16
    file.write_bytes(data)
    if num_documents > 2:  # else it is in the only one
        with pytest.raises(BadInput, match="xx train tokens 0 to 1 cannot be read: DATA_LOSS"):
            TokenStore(tmp_path / "store").document_of("xx", "train", 0)


def test_pieces_make_no_difference(tmp_path, small_files):
    """Nor do threads."""
    documents = make_documents(90)
    whole = write_store(tmp_path / "whole", {"xx": documents}, VOCABULARY)
    pieces = [
        token_store.tokenise(documents[first : first + 7], VOCABULARY, threads=first % 2 == 0)
        for first in range(0, 90, 7)
    ]
    assert [piece.tokens.dtype for piece in pieces] == [np.uint32] * 13
    with build_store(tmp_path / "pieces", partial=tmp_path / "beside") as root:
        assert root == str(tmp_path / "beside")
        entry = token_store.write_tokens(root, "xx", pieces, num_documents=90)
        token_store.write_manifest(root, {"xx": entry}, VOCABULARY)
    assert TokenStore(tmp_path / "pieces").fingerprint == whole.fingerprint
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file():
            other = tmp_path / "pieces" / path.relative_to(tmp_path / "whole")
            assert other.read_bytes() == path.read_bytes()


def test_what_a_kill_left_is_replaced(tmp_path):
    (tmp_path / "beside" / "xx").mkdir(parents=True)
    with (
        pytest.raises(KeyboardInterrupt),
        build_store(tmp_path / "store", partial=tmp_path / "beside") as root,
    ):
        assert not any((tmp_path / "beside").iterdir()) and root
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_unknown_names(tmp_path):
    store = write_store(tmp_path / "store", {"xx": ["a", "b"], "yy": ["c", "d"]}, VOCABULARY)
    assert store.languages == ("xx", "yy")
    with pytest.raises(BadInput, match="no language 'zz'; it has: xx, yy"):
        store.num_tokens("zz", "train")
    with pytest.raises(BadInput, match="no split 'test'; there are: train, validation"):
        store.read_windows("xx", "test", np.array([0]), 1)
    for start, stop in ((-1, 1), (0, 99), (2, 1)):
        with pytest.raises(IndexError):
            store.read("xx", "train", start, stop)


def test_missing_or_damaged_manifest(tmp_path):
    with pytest.raises(BadInput, match="there is no token store"):
        TokenStore(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"has no manifest\.json"):
        TokenStore(tmp_path / "empty")
    write_store(tmp_path / "store", {"xx": ["a", "b"]}, VOCABULARY)
    path = tmp_path / "store" / "manifest.json"
    whole = path.read_bytes()
    changed = json.loads(whole)
    changed["languages"]["xx"]["splits"]["train"]["num_tokens"] += 1
    for data in (
        whole[:-10], whole[:-1], b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff" + whole,
        whole + b"\n", json.dumps(changed, sort_keys=True, indent=1).encode() + b"\n",
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"manifest\.json is damaged"):
            TokenStore(tmp_path / "store")
    path.write_bytes(whole.replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(BadInput, match="version 2; this program reads version 1"):
        TokenStore(tmp_path / "store")


def test_missing_or_other_arrays(tmp_path):
    languages = {"xx": make_documents(9), "yy": make_documents(9, 1), "zz": make_documents(30)}
    write_store(tmp_path / "whole", languages, VOCABULARY)

    def damaged(name):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        return tmp_path / name

    store = damaged("missing")
    shutil.rmtree(store / "yy" / "validation" / "tokens")
    with pytest.raises(BadInput, match="the array yy/validation/tokens is missing"):
        TokenStore(store)
    store = damaged("length")
    shutil.copytree(store / "zz/train/tokens", store / "xx/train/tokens", dirs_exist_ok=True)
    with pytest.raises(BadInput, match=r"xx/train/tokens has the shape \[\d+\], the manifest says"):
        TokenStore(store)
    store = damaged("file")
    (store / "yy/train/tokens/c/0").unlink()
    with pytest.raises(BadInput, match="yy train tokens 1 to 3 cannot be read"):
        TokenStore(store).read("yy", "train", 1, 3)
    with pytest.raises(BadInput, match="yy train tokens"):
        TokenStore(store).verify()


def test_exchanged_files_are_noticed(tmp_path):
    """Whole, with good checksums, and of the same length, but of another language."""
    documents = {"xx": ["abcd", "ef", "g"], "yy": ["hijk", "lm", "n"]}
    write_store(tmp_path / "store", documents, VOCABULARY)
    one, two = (tmp_path / "store" / name / "train/tokens/c/0" for name in ("xx", "yy"))
    shutil.copy(one, two)
    with pytest.raises(BadInput, match="yy train tokens 0 to 8 are not the ones"):
        TokenStore(tmp_path / "store").verify()


def test_a_store_exchanged_while_open(tmp_path):
    store = write_store(tmp_path / "store", {"xx": ["a", "b"]}, VOCABULARY)
    shutil.rmtree(tmp_path / "store")
    write_store(tmp_path / "store", {"xx": ["a", "c"]}, VOCABULARY)
    with pytest.raises(BadInput, match="replaced by another store"):
        store.verify()


def flipped(data, position, bit):
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def array_flips(data):
    return (flipped(data, position, bit) for position in range(len(data)) for bit in range(8))


def json_flips(data):
    return (flipped(data, position, position // 3 % 8) for position in range(0, len(data), 3))


def test_every_flipped_bit_is_noticed(tmp_path):
    """All bits of the arrays, one bit of every third byte of the JSON files."""
    path = tmp_path / "store"
    write_store(path, {"xx": ["ab", "c", "d"]}, VOCABULARY).verify()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) == 9
    for file in files:
        whole = file.read_bytes()
        is_json = file.suffix == ".json"
        for data in json_flips(whole) if is_json else array_flips(whole):
            file.write_bytes(data)
            with pytest.raises(BadInput, match="damaged|xx (train|validation) |version|missing"):
                TokenStore(path).verify()
        for length in range(0, len(whole), 50 if is_json else 1):
            file.write_bytes(whole[:length])
            with pytest.raises(BadInput):
                TokenStore(path).verify()
        file.write_bytes(whole)
    TokenStore(path).verify()


def test_damage_is_located(tmp_path, small_files):
    store = write_store(tmp_path / "store", {"xx": make_documents(100)}, VOCABULARY)
    num_tokens = store.num_tokens("xx", "train")
    file = tmp_path / "store/xx/train/tokens/c/1"  # tokens 256 to 512
    data = bytearray(file.read_bytes())
    data[64 * 4 + 4 + 40] ^= 1  # in the second chunk, behind 64 tokens and their crc32c
    file.write_bytes(data)
    store = TokenStore(tmp_path / "store")
    with pytest.raises(
        BadInput, match="store: xx train tokens 320 to 384 cannot be read: DATA_LOSS"
    ):
        store.verify()
    with pytest.raises(BadInput, match="xx train tokens 320 to 337 cannot be read"):
        store.read_windows("xx", "train", np.array([0, 20]), 16)
    expected = plain_tokens(make_documents(100)[:95])
    np.testing.assert_array_equal(store.read("xx", "train", 0, 320), expected[:320])
    np.testing.assert_array_equal(store.read("xx", "train", 384, num_tokens), expected[384:])


def test_ids_outside_the_vocabulary_are_noticed(tmp_path):
    class Wrong(ByteVocabulary):
        size = 100

    store = write_store(tmp_path / "store", {"xx": ["az", "b"]}, Wrong())
    with pytest.raises(BadInput, match="xx train tokens 0 to 3 are damaged: id 126"):
        store.read("xx", "train", 0, 3)


def test_ids_outside_the_vocabulary_are_not_trained_on(tmp_path, small_files):
    class Wrong(ByteVocabulary):
        size = 100

    texts = ["a" * 200, "z" * 3, "a" * 200, "b"]
    store = write_store(tmp_path / "store", {"xx": texts}, Wrong())
    with pytest.raises(BadInput, match="xx train tokens 0 to 65 are damaged: id 101"):
        store.read_windows("xx", "train", np.array([0]), 64)
    Wrong.size = 102  # 'a' is 101, 'z' 126
    store = write_store(tmp_path / "other", {"xx": texts}, Wrong())
    expected = plain_tokens(texts[:-1])
    np.testing.assert_array_equal(
        store.read_windows("xx", "train", np.array([2, 5]), 64),
        [expected[128:193], expected[320:385]],
    )
    with pytest.raises(BadInput, match="xx train tokens 192 to 257 are damaged: id 126"):
        store.read_windows("xx", "train", np.array([2, 3, 5]), 64)


@pytest.mark.parametrize("chunk_bytes", [256, 1 << 12, 1 << 16])
def test_stores_with_other_chunks(tmp_path, monkeypatch, chunk_bytes):
    """Chunks were 64 KiB once. Tokens come by the way of local files and by TensorStore's alike."""
    monkeypatch.setattr(token_store, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(token_store, "_SHARD_BYTES", 4 * chunk_bytes)
    documents = {"xx": make_documents(600 if chunk_bytes == 256 else 4000)}
    write_store(tmp_path / "store", documents, VOCABULARY)
    monkeypatch.undo()
    store = TokenStore(f"file://{tmp_path}/store")
    other = TokenStore(tmp_path / "store")
    other._local.clear()
    num_tokens = store.num_tokens("xx", "train")
    np.testing.assert_array_equal(
        store.read("xx", "train", 0, num_tokens), other.read("xx", "train", 0, num_tokens)
    )
    windows = np.random.default_rng(0).permutation(store.num_windows("xx", "train", 100))
    found = store.read_windows("xx", "train", windows, 100)
    np.testing.assert_array_equal(found, other.read_windows("xx", "train", windows, 100))
    rows = np.full((len(windows) + 2, 101), -1, np.int32)
    at = np.random.default_rng(1).permutation(len(windows)) + 1
    store.read_windows_into(rows, at, "xx", "train", windows)
    np.testing.assert_array_equal(rows[at], found)
    assert (rows[[0, -1]] == -1).all()  # of others
    assert not store._arrays and list(other._arrays) == ["xx/train/tokens"]
    store.verify()
    file = tmp_path / "store/xx/train/tokens/c/1"
    data = bytearray(file.read_bytes())
    data[9] ^= 2
    file.write_bytes(data)
    first = chunk_bytes  # of the second file
    with pytest.raises(BadInput, match=f"tokens {first} to {first + chunk_bytes // 4} cannot"):
        store.verify()


def test_damage_since_the_first_reading_is_noticed(tmp_path, small_files):
    """By the same store: nothing is remembered of checksums."""
    write_store(tmp_path / "store", {"xx": make_documents(100)}, VOCABULARY)
    store = TokenStore(tmp_path / "store", cache_bytes=0)
    windows = np.arange(store.num_windows("xx", "train", 64))
    before = store.read_windows("xx", "train", windows, 64)
    file = tmp_path / "store/xx/train/tokens/c/1"  # tokens 256 to 512
    with file.open("r+b") as opened:
        opened.seek(2 * (64 * 4 + 4) + 8)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))
    for _ in range(2):
        with pytest.raises(BadInput, match="xx train tokens 320 to 385 cannot be read: DATA_LOSS"):
            store.read_windows("xx", "train", windows, 64)
        with pytest.raises(BadInput, match="xx train tokens 384 to 449 cannot be read: DATA_LOSS"):
            store.read_windows("xx", "train", windows[6:], 64)
    whole = np.delete(windows, [5, 6])
    np.testing.assert_array_equal(store.read_windows("xx", "train", whole, 64), before[whole])
    with file.open("r+b") as opened:
        opened.truncate(300)  # while it is open: no signal, an error
    with pytest.raises(BadInput, match="xx train tokens 256 to 321 cannot be read"):
        store.read_windows("xx", "train", windows[4:5], 64)


def test_threads_may_share_a_store(tmp_path, small_files):
    documents = {name: make_documents(60, seed) for seed, name in enumerate(("xx", "yy", "zz"))}
    write_store(tmp_path / "store", documents, VOCABULARY)
    store = TokenStore(tmp_path / "store", cache_bytes=4096)

    def read(name):
        num_windows = store.num_windows(name, "train", 16)
        return store.read_windows(name, "train", np.arange(num_windows), 16)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read, ["xx", "yy", "zz"] * 8))
    for name, result in zip(["xx", "yy", "zz"] * 8, results, strict=True):
        tokens = plain_tokens(documents[name][:57])
        np.testing.assert_array_equal(result[:, :-1].ravel(), tokens[: result[:, :-1].size])


def test_opening_many_languages_is_fast(tmp_path):
    documents = {f"l{number}": ["one", "two"] for number in range(59)}
    write_store(tmp_path / "store", documents, VOCABULARY)
    start_seconds = time.perf_counter()
    TokenStore(tmp_path / "store")
    assert time.perf_counter() - start_seconds < 0.5
