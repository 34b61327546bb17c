"""manifest.json of a checkpoint: size and CRC-32C of each of its files, written before the checkpoint takes its name.

The file protects itself: it is accepted only if its bytes are those that would be written for what it says.
"""

import concurrent.futures
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import google_crc32c
from etils import epath

NAME = "manifest.json"
_BLOCK_BYTES = 1 << 20  # the checksum of a block holds Python's lock: 0.1 ms
_NUM_THREADS = 4

Entry = tuple[int, str]  # size in bytes, CRC-32C in eight hexadecimal digits


class Damage(ValueError):
    """A checkpoint is not what its manifest says; the message begins with the name of the file."""


def files_below(folder: epath.Path) -> list[str]:
    """Names of all files below `folder`, sorted, with / between their parts."""
    found, folders = [], [(folder, "")]
    while folders:
        here, prefix = folders.pop()
        for path in here.iterdir():
            if path.is_dir():
                folders.append((path, f"{prefix}{path.name}/"))
            else:
                found.append(f"{prefix}{path.name}")
    return sorted(found)


def entry_of(path: epath.Path, *, sync: bool = False) -> Entry:
    """Size and checksum of a file as it can be read now; `sync` waits until a local one is on its disk."""
    crc, size = 0, 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                crc = google_crc32c.extend(crc, block)
                size += len(block)
            if sync and not is_remote(path):
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damage(f"{path}: {error.strerror}") from error
        raise
    return size, f"{crc:08x}"


def entries_of(folder: epath.Path, names: Iterable[str], *, sync: bool = False) -> dict[str, Entry]:
    """Size and checksum of these files below `folder`."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as threads:
        found = threads.map(lambda name: entry_of(folder / name, sync=sync), names)
        return dict(zip(names, found, strict=True))


def is_remote(path: epath.Path) -> bool:
    """Whether it is a URL."""
    return "://" in os.fspath(path)


def write(folder: epath.Path, known: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
    """Writes the manifest of what lies below `folder` and returns it.

    `known` entries are taken where the size still agrees: those who wrote the files have read them again themselves.
    """
    names = [name for name in files_below(folder) if name != NAME]
    entries = {
        name: (size, crc)
        for name, (size, crc) in (known or {}).items()
        if name in set(names) and (folder / name).stat().length == size
    }
    entries |= entries_of(folder, (name for name in names if name not in entries), sync=True)
    target = folder / NAME
    target.write_bytes(_serialised(entries))
    if not is_remote(target):
        with target.open("rb") as file:
            os.fsync(file.fileno())
    return entries


def _serialised(entries: Mapping[str, Entry]) -> bytes:
    files = {name: list(entries[name]) for name in sorted(entries)}
    body = json.dumps(files, indent=0, ensure_ascii=True)
    checksum = f"{google_crc32c.value(body.encode()):08x}"
    return f'{{"format": 1, "checksum": "{checksum}", "files": {body}}}\n'.encode()


def read(folder: epath.Path) -> dict[str, Entry] | None:
    """What the manifest says; None if there is none. Damage if it is not what was written."""
    path = folder / NAME
    if not path.exists():
        return None
    raw = path.read_bytes()
    try:
        found: Any = json.loads(raw)
        entries = {str(name): (int(size), str(crc)) for name, (size, crc) in found["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{NAME}: cannot be read: {error}") from error
    if raw != _serialised(entries):
        raise Damage(f"{NAME}: differs from its own checksum")
    return entries


def check_names(folder: epath.Path, entries: Mapping[str, Entry]) -> None:
    """Damage that names a file that is missing, or that is there and unknown."""
    there = set(files_below(folder)) - {NAME}
    if missing := sorted(entries.keys() - there):
        raise Damage(f"{missing[0]}: is missing{_and_others(missing)}")
    if unknown := sorted(there - entries.keys()):
        raise Damage(f"{unknown[0]}: is not of this checkpoint{_and_others(unknown)}")


def check_files(folder: epath.Path, entries: Mapping[str, Entry], names: Iterable[str]) -> None:
    """Damage that names a file whose size or content differs."""
    names = list(names)
    for name in names:  # before anything is read
        if not (folder / name).exists():
            raise Damage(f"{name}: is missing")
        size = (folder / name).stat().length
        if size != entries[name][0]:
            raise Damage(f"{name}: has {size} bytes, {entries[name][0]} were written")
    found = entries_of(folder, names)
    if wrong := [name for name in names if found[name] != entries[name]]:
        name = wrong[0]
        was, now = entries[name][1], found[name][1]
        raise Damage(f"{name}: CRC-32C is {now}, {was} was written{_and_others(wrong)}")


def problems(folder: epath.Path, entries: Mapping[str, Entry]) -> Iterator[str]:
    """A line for each file that is missing, unknown or other than written; everything is read."""
    there = set(files_below(folder)) - {NAME}
    for name in sorted(there - entries.keys()):
        yield f"{name}: is not of this checkpoint"
    for name in entries:
        try:
            check_files(folder, entries, [name])
        except Damage as error:
            yield str(error)


def share(entries: Mapping[str, Entry], number: int, num_shares: int) -> list[str]:
    """The files that process `number` checks: about the same bytes for each, the largest dealt first."""
    loads = [0] * num_shares
    mine = []
    for name in sorted(entries, key=lambda name: (-entries[name][0], name)):
        chosen = loads.index(min(loads))
        loads[chosen] += entries[name][0] + 1
        if chosen == number:
            mine.append(name)
    return mine


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
