"""The manifest names what is missing, unknown or other than written, and protects itself."""

import google_crc32c
import numpy as np
import pytest
from etils import epath

from bloomjax import checkpoint_manifest as manifest
from bloomjax.checkpoint_manifest import Damage


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    for number, size in enumerate((0, 1, 999, 3_000_000)):
        content = np.random.default_rng(number).bytes(size)
        (tmp_path / "state" / "d" / str(number)).write_bytes(content)
    (tmp_path / "top").write_bytes(b"123456789")
    return epath.Path(tmp_path)


def test_what_it_says(folder):
    entries = manifest.write(folder)
    assert entries == manifest.read(folder) and list(manifest.problems(folder, entries)) == []
    assert entries["top"] == (
        9,
        "e3069283",
    )  # the check value of CRC-32C (RFC 3720 calls it CRC32C)
    data = (folder / "state/d/3").read_bytes()
    assert entries["state/d/3"] == (3_000_000, f"{google_crc32c.value(data):08x}")
    assert sorted(entries) == ["state/d/0", "state/d/1", "state/d/2", "state/d/3", "top"]
    assert manifest.write(folder) == entries  # its own file is not among them


def test_every_bit_of_the_manifest_counts(folder):
    manifest.write(folder)
    raw = (folder / manifest.NAME).read_bytes()
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / manifest.NAME).write_bytes(bytes(changed))
        with pytest.raises(Damage, match="^manifest.json: "):
            manifest.read(folder)
    for text in (b"", raw[:-1], raw + b" ", b"[]", b"null", b'{"files": {"a": 3}}'):
        (folder / manifest.NAME).write_bytes(text)
        with pytest.raises(Damage):
            manifest.read(folder)


def test_files_that_are_missing_unknown_or_changed(folder):
    entries = manifest.write(folder)
    (folder / "state/d/9").write_bytes(b"")
    with pytest.raises(Damage, match="^state/d/9: is not of this checkpoint"):
        manifest.check_names(folder, entries)
    (folder / "state/d/9").unlink()
    content = (folder / "state/d/2").read_bytes()
    (folder / "state/d/2").unlink()
    with pytest.raises(Damage, match="^state/d/2: is missing"):
        manifest.check_names(folder, entries)
    (folder / "state/d/2").write_bytes(content[:-1])
    with pytest.raises(Damage, match="^state/d/2: has 998 bytes, 999 were written"):
        manifest.check_files(folder, entries, entries)
    (folder / "state/d/2").write_bytes(content[::-1])
    with pytest.raises(Damage, match="^state/d/2: CRC-32C is "):
        manifest.check_files(folder, entries, entries)
    (folder / "state/d/0").unlink()
    assert [each.split(":")[0] for each in manifest.problems(folder, entries)] == [
        "state/d/0", "state/d/2"
    ]  # fmt: skip


def test_known_entries_are_taken_while_the_size_agrees(folder):
    known = {"top": (9, "00000000"), "state/d/1": (7, "00000000"), "gone": (1, "00000000")}
    entries = manifest.write(folder, known)
    assert entries["top"] == (9, "00000000") and entries["state/d/1"][0] == 1
    assert "gone" not in entries


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares(num_shares):
    rng = np.random.default_rng(0)
    entries = {str(n): (int(size), "") for n, size in enumerate(rng.integers(0, 1000, 100))}
    shares = [manifest.share(entries, number, num_shares) for number in range(num_shares)]
    assert sorted(sum(shares, [])) == sorted(entries)
    loads = [sum(entries[name][0] for name in share) for share in shares]
    assert max(loads) - min(loads) < 1000
