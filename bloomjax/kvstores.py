"""Where a store lies: a local folder or a URL, by TensorStore's key-value stores. Errors are one line of BadInput."""

import os
from pathlib import Path
from typing import Any

import tensorstore

from bloomjax.errors import BadInput

# One for all stores: limits of concurrency, credentials, and what memory:// keeps.
STORAGE = tensorstore.Context()


def context_of(cache_bytes: int) -> tensorstore.Context:
    """STORAGE with a cache of its own for chunks that were read."""
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, parent=STORAGE)


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """The local folder of `path`, None for a URL of something else."""
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else None


def kvstore(path: str | os.PathLike[str], name: str = "") -> Any:
    """TensorStore's specification of the folder `name` below `path`."""
    local = local_path(path)
    if local is not None:
        return {"driver": "file", "path": os.path.join(os.path.abspath(local), name, "")}
    return os.fspath(path).rstrip("/") + "/" + (f"{name}/" if name else "")


def open_kvstore(spec: Any, path: str | os.PathLike[str]) -> tensorstore.KvStore:
    """The store of this specification; `path` is what an error calls it."""
    try:
        return tensorstore.KvStore.open(spec, context=STORAGE).result()
    except Exception as error:
        raise BadInput(f"cannot open {path}: {reason(error)}") from None


def read_value(spec: Any, key: str, path: str | os.PathLike[str]) -> bytes | None:
    """The bytes below `key` of the store of this specification, None if there is no such key."""
    return value_of(open_kvstore(spec, path).read(key), f"{path}/{key}")


def value_of(future: Any, name: str) -> bytes | None:
    """The bytes a KvStore read gives, None if there is no such key."""
    try:
        result = future.result()
    except Exception as error:
        raise BadInput(f"cannot read {name}: {reason(error)}") from None
    return None if result.state == "missing" else result.value


def write_value(path: str | os.PathLike[str], key: str, value: bytes) -> None:
    """Writes the file or object `key` in the folder or URL `path`."""
    try:
        open_kvstore(kvstore(path), path).write(key, value).result()
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"cannot write {path}/{key}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """TensorStore's message on one line, without its lists of source lines."""
    return " ".join(str(error).split(" [", 1)[0].split())
