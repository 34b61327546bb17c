"""Files and folders that are there are whole: written beside and renamed."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from bloomjax.errors import BadInput


def write_whole(path: Path, data: bytes) -> None:
    """Writes `path` (and makes its folder) so that a crash leaves the old content or the new, on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def whole_folder(
    target: Path, *, reads: Path, marks: Sequence[str], overwrite: bool = False
) -> Iterator[Path]:
    """A new folder beside `target` to write in; it takes its name when the block ends well, else it is deleted.

    Args:
      reads: what the block reads; it must not lie in `target`.
      marks: patterns of files by which a folder of this kind is known; `overwrite` replaces no other.
      overwrite: swap out what stands there, as a whole and at the end.

    Raises BadInput for a target that must not be replaced or appears meanwhile, and for what the disk refuses.
    """
    with one_line_errors(f"cannot write {target}"):
        target = Path(os.path.realpath(target))
        if reads.resolve().is_relative_to(target):
            raise BadInput(f"{target} holds {reads}, which is to be read; take another folder")
        _check_replaceable(target, marks, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.iterdir():
            if leftover.name.startswith(f"{target.name}.partial-"):
                line = f"bloomjax: {leftover} is of a run that was killed, or still works; nothing reads it"
                print(line, file=sys.stderr)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
        try:
            beside.chmod(0o755)
            with _terminated_as_exit():
                yield beside
            _check_replaceable(target, marks, overwrite)
            _swap_in(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """An OSError becomes BadInput: `what`, and what the operating system said."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise BadInput(f"{what}: {error.strerror or error}{where}") from error


def _check_replaceable(target: Path, marks: Sequence[str], overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise BadInput(f"{target} exists already and is no folder")
    if not overwrite:
        raise BadInput(f"{target} exists already; --overwrite replaces it")
    if any(target.iterdir()) and not all(any(target.glob(mark)) for mark in marks):
        raise BadInput(f"{target} is not replaced: it has no {' and no '.join(marks)}")


def _swap_in(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.old-"))
    old = aside / target.name
    try:
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        print(f"bloomjax: {aside} could not be deleted", file=sys.stderr)


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM, which a cluster sends, unwinds as Ctrl-C does, so that what was begun is deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signal_number, _):
        sys.exit(128 + signal_number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
