"""The verb that checks a store: what it says, and its exit code."""

import sys

import numpy as np
import pytest
from test_token_store import VOCABULARY, make_documents

from bloomjax import config, verify_store
from bloomjax.errors import BadInput
from bloomjax.token_store import TokenStore, write_store


@pytest.fixture
def store_dir(tmp_path):
    texts = {name: make_documents(3000, seed) for seed, name in enumerate(("xx", "yy", "zz"))}
    write_store(tmp_path / "store", texts, VOCABULARY)
    return tmp_path / "store"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        config.call(verify_store.main, [sys.argv[0], *arguments], verify_store._FLAGS)
    return stop.value.code, *capsys.readouterr()


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_whole(store_dir, capsys):
    code, out, err = run(capsys, f"--store={store_dir}")
    assert (code, err) == (0, "")
    assert out.startswith(f"{store_dir}: 3 languages, 8,999 documents, ")  # one is blank
    assert "tokens, nothing is damaged; " in out and out.endswith("MB/s\n") and out.count("\n") == 1


def test_flipped_bits_are_named_by_language_and_token(store_dir, capsys):
    flip(store_dir / "xx/train/tokens/c/0", 16 * (1024 * 4 + 4) + 100)  # the 17th chunk
    flip(store_dir / "zz/validation/document_ends/c/0", 9)
    code, out, err = run(capsys, f"--store={store_dir}")
    assert code == 1
    first, second = out.splitlines()
    assert first.startswith(
        f"{store_dir}: xx train tokens 16384 to 17408 cannot be read: DATA_LOSS"
    )
    assert second.startswith(f"{store_dir}: zz validation tokens 0 to ")
    assert err == f"bloomjax: {store_dir} is damaged in 2 of 6 splits\n"
    # Never trained on: the windows of that chunk are refused, its neighbours are as before.
    store = TokenStore(store_dir)
    store.read_windows("xx", "train", np.array([0, 15, 18, 33]), 1000)
    for window in (16, 17):
        with pytest.raises(
            BadInput, match=rf"xx train tokens {window}000 to {window + 1}001 cannot"
        ):
            store.read_windows("xx", "train", np.array([0, window]), 1000)


def test_other_damage(store_dir, tmp_path, capsys):
    assert run(capsys) == (
        1, "", "bloomjax: --store=DIR is needed: the token store to check\n",
    )  # fmt: skip
    code, _, err = run(capsys, f"--store={tmp_path}/other")
    assert (code, err.count("\n")) == (1, 1) and "there is no token store" in err
    flip(store_dir / "manifest.json", 40)
    code, out, err = run(capsys, f"--store={store_dir}")
    assert (code, out) == (1, "") and "manifest.json is damaged" in err
