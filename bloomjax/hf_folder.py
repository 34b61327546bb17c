"""A folder with a Hugging Face model: its safetensors are read warily and written in a stream.

Weights come from safetensors alone: no pickle, no code, nothing remote.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from bloomjax import hf
from bloomjax.errors import BadInput
from bloomjax.model import BloomConfig

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# What safetensors calls the dtypes that are numbers of a float32 model; float64 is rounded.
_READABLE = ("F64", "F32", "F16", "BF16")
_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK_BYTES = 1 << 26  # of a block of rows, in float32


class HFFolder:
    """A BloomForCausalLM on disk: released layouts old and new, one safetensors file or many, any float dtype.

    Attributes:
      path: the folder.
      config, sequence_length: read from config.json.
      tensors: what the model consists of (hf.tensors); each is there, in its shape.
    """

    def __init__(self, path: Path):
        """Opens every file and checks it against config.json; reads no tensor.

        Raises BadInput naming file and tensor: no such folder, no BLOOM, pickled weights only, a shard that is missing
        or cut short, an index that points outside the folder, a tensor that is missing, unknown, doubled or of
        another shape or kind.
        """
        self.path = path
        if not path.is_dir():
            raise BadInput(f"there is no folder {path}")
        hf_config = read_json(path / CONFIG)
        self.config, self.sequence_length = hf.from_hf_config(hf_config, str(path / CONFIG))
        self._files: dict[str, Path] = {}  # by name without prefix
        self._stored_names: dict[str, str] = {}
        self._shapes: dict[str, tuple[str, list[int]]] = {}
        for file in self._shards():
            self._look_into(file)
        self._check_index()
        num_layers = 1 + max((_layer_of(name) for name in self._files), default=-1)
        if self.config.num_layers > num_layers:  # before a list of what a damaged number asks for
            raise BadInput(
                f"{path / CONFIG} says n_layer {self.config.num_layers}; {path} has the tensors of {num_layers} layers"
            )
        self.tensors = hf.tensors(self.config)
        self._check_tensors()
        if hf_config.get("tie_word_embeddings") is False and hf.HEAD not in self._files:
            raise BadInput(
                f"{path / CONFIG} says tie_word_embeddings false, but {hf.HEAD} is missing"
            )

    def _shards(self) -> list[Path]:
        if (self.path / INDEX).exists():
            names = set(self._weight_map().values())
            single = self.path / "model.safetensors"
            if single.name not in names and single.exists():  # which transformers would read
                raise BadInput(
                    f"{single} lies beside {INDEX}, which does not name it; delete the older of both"
                )
            return [self.path / name for name in sorted(names)]
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            pickled = sorted(p.name for p in self.path.glob("*.bin"))
            if pickled:
                raise BadInput(
                    f"{self.path} has only pickled weights ({pickled[0]}), which may run code when read; where "
                    'you trust them, convert them: python -c "from transformers import AutoModelForCausalLM as M; '
                    f"M.from_pretrained('{self.path}', dtype='auto').save_pretrained('{self.path}-safetensors')\""
                )
            there = ", ".join(sorted(p.name for p in self.path.iterdir())[:10]) or "nothing"
            raise BadInput(f"{self.path} has no *.safetensors; there is: {there}")
        return found

    def _weight_map(self) -> dict[str, str]:
        """Tensor name to file name, of the index."""
        where = self.path / INDEX
        index = read_json(where)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(f"{where} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or "\0" in file or not file.endswith(".safetensors"):
                raise BadInput(f"{where}: {name} lies in {file!r}, which is no safetensors file")
            if Path(file).name != file:
                raise BadInput(f"{where}: {name} lies in {file!r}, outside of the folder")
        return weight_map

    def _look_into(self, file: Path) -> None:
        with _opened(file) as shard:
            for stored_name in shard.keys():
                name = stored_name.removeprefix(hf.PREFIX)
                if name in self._files:
                    raise BadInput(f"{name} is in {self._files[name]} and again in {file}")
                part = shard.get_slice(stored_name)
                self._files[name], self._stored_names[name] = file, stored_name
                self._shapes[name] = part.get_dtype(), part.get_shape()

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for stored_name, file in self._weight_map().items():
            there = self._files.get(stored_name.removeprefix(hf.PREFIX))
            if there is None or there.name != file:
                raise BadInput(
                    f"{self.path / INDEX} says {stored_name} lies in {file}; it does not"
                )

    def _check_tensors(self) -> None:
        expected = {tensor.name: tensor.shape for tensor in self.tensors}
        expected_head = {hf.HEAD: expected["word_embeddings.weight"]}
        for name, file in self._files.items():
            if name not in expected | expected_head:
                raise BadInput(f"{file} has a tensor {name}, which is not of this BLOOM")
        for name, shape in (expected | expected_head).items():
            if name not in self._files:
                if name == hf.HEAD:
                    continue
                raise BadInput(f"{self.path} lacks the tensor {name} of shape {list(shape)}")
            dtype, found = self._shapes[name]
            where = f"{name} in {self._files[name]}"
            if tuple(found) != shape:
                raise BadInput(f"{where} has shape {found}, {CONFIG} asks for {list(shape)}")
            if dtype not in _READABLE:
                raise BadInput(f"{where} holds {dtype}; readable are {', '.join(_READABLE)}")

    @property
    def dtypes(self) -> set[str]:
        """Of the tensors, as safetensors calls them."""
        return {dtype for dtype, _ in self._shapes.values()}

    def blocks(self, tensor: hf.Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in float32: first row and rows of a block, in order; all at once unless the layout is plain.

        BadInput for a value that is not finite, in float32.
        """
        name = tensor.name
        num_rows = tensor.shape[0]
        step = num_rows
        if tensor.is_plain:
            step = max(1, _BLOCK_BYTES * num_rows // (4 * tensor.num_elements))
        with _opened(self._files[name]) as shard:
            for start in range(0, num_rows, step):
                rows = shard.get_slice(self._stored_names[name])[
                    start : min(start + step, num_rows)
                ]
                with np.errstate(over="ignore"):
                    rows = rows.astype(np.float32, copy=False)
                if not np.isfinite(rows).all():
                    raise BadInput(f"{name} in {self._files[name]} has values that are not finite")
                yield start, rows

    def check_head(self) -> None:
        """BadInput if the head is stored and is not the embedding: BLOOM's is tied."""
        if hf.HEAD not in self._files:
            return
        embedding = self.tensors[0]
        head = dataclasses.replace(embedding, name=hf.HEAD)
        for (start, ours), (_, theirs) in zip(
            self.blocks(embedding), self.blocks(head), strict=True
        ):
            rows = np.flatnonzero((ours != theirs).any(axis=1))
            if len(rows):
                raise BadInput(
                    f"{hf.HEAD} in {self._files[hf.HEAD]} differs from {embedding.name} from row {start + rows[0]} on; "
                    "a BLOOM has one matrix for both"
                )


def write_tensors(
    folder: Path,
    config: BloomConfig,
    dtype: str,
    max_shard_bytes: int,
    blocks: Iterable[np.ndarray],
    metadata: dict[str, str],
) -> None:
    """Writes the safetensors files of a model, in one pass over its numbers.

    Args:
      dtype: of hf.NUMPY_DTYPES.
      max_shard_bytes: of the tensors in a file; a larger tensor has a file of its own.
      blocks: all numbers of hf.tensors(config), tensor after tensor, in C order, already in `dtype`.
      metadata: strings for the header of each file.

    Raises OSError when the disk refuses.
    """
    itemsize = hf.NUMPY_DTYPES[dtype].itemsize
    shards = plan_shards(hf.tensors(config), itemsize, max_shard_bytes)
    stream = iter(blocks)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, _TAGS[dtype], itemsize, stream, metadata)
        weight_map |= {hf.PREFIX + tensor.name: name for tensor in shard}
    if len(shards) > 1:
        num = sum(tensor.num_elements for shard in shards for tensor in shard)
        totals = {"total_parameters": num, "total_size": num * itemsize}
        index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(
    tensors: Sequence[hf.Tensor], itemsize: int, max_shard_bytes: int
) -> list[list[hf.Tensor]]:
    """Consecutive tensors for each file, as many as fit."""
    shards: list[list[hf.Tensor]] = []
    room = -1
    for tensor in tensors:
        size = tensor.num_elements * itemsize
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_shard(
    file: BinaryIO,
    shard: Sequence[hf.Tensor],
    tag: str,
    itemsize: int,
    blocks: Iterator[np.ndarray],
    metadata: dict[str, str],
) -> None:
    """The format: length of the header in 8 bytes, the header in JSON padded to 8, the numbers of all tensors."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.num_elements * itemsize
        header[hf.PREFIX + tensor.name] = {
            "dtype": tag,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    while written < end:
        block = next(blocks)
        file.write(block.reshape(-1).view(np.uint8).data)
        written += block.nbytes
    assert written == end, "a block spans two files"
    file.flush()
    os.fsync(file.fileno())


def metadata(folder: Path) -> dict[str, str]:
    """Of the header of the folder's first safetensors file. BadInput if there is none."""
    first = min(folder.glob("*.safetensors"), default=folder / "model.safetensors")
    with _opened(first) as shard:
        return shard.metadata() or {}


def read_json(path: Path) -> Any:
    """BadInput if the file is missing, unreadable or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:10]) or "nothing"
        raise BadInput(f"there is no {path}; {path.parent} has: {there}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON: {error}") from None


def _layer_of(name: str) -> int:
    match = re.match(r"h\.(\d{1,6})\.", name)
    return int(match.group(1)) if match else -1


class _opened:
    """A safetensors file; BadInput if it is missing, cut short or otherwise none."""

    def __init__(self, file: Path):
        self._path = file
        if not file.is_file():
            there = ", ".join(sorted(p.name for p in file.parent.glob("*.safetensors"))) or "none"
            raise BadInput(f"the shard {file} is missing; there are: {there}")
        try:
            self._file = safetensors.safe_open(file, "np")
        except (safetensors.SafetensorError, OSError) as error:
            raise BadInput(f"{file} is damaged or no safetensors file: {error}") from None

    def __enter__(self) -> Any:
        return self._file.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._file.__exit__(kind, error, traceback)
        if isinstance(error, safetensors.SafetensorError):
            raise BadInput(f"{self._path} is damaged: {error}") from None
