"""Files and folders that are there are whole: written beside and renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
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
def whole_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` to write in; it takes its name when the block ends well, else it is deleted.

    With `overwrite`, what stands there is swapped out whole, and deleted last. Raises BadInput if `target` exists
    without `overwrite` or is no folder, and for whatever the disk refuses in the block (no space, no permission).
    """
    if target.exists() and not (overwrite and target.is_dir()):
        hint = "--overwrite replaces it" if target.is_dir() else "and is no folder"
        raise BadInput(f"{target} exists already; {hint}")
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
        beside.chmod(0o755)
        yield beside
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.old-"))
            target.rename(old / target.name)
            beside.rename(target)
            shutil.rmtree(old)
        else:
            beside.rename(target)
    except OSError as error:
        raise BadInput(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
