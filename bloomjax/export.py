"""A checkpoint as a Hugging Face folder: `python -m bloomjax.export --checkpoint=MODEL_DIR`.

Streams from the files of the checkpoint to those of the folder, a layer of one matrix at a time: needs no mesh, no
accelerator and never holds the model in memory. What is read is compared with the checkpoint's fingerprints.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from bloomjax import config, hf, hf_folder, hf_tokenizer, hf_verify
from bloomjax.checkpoint_arrays import ParamsReader
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors, whole_folder
from bloomjax.model_dir import Trained, open_model_dir
from bloomjax.mup import widths_of

_FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "MODEL_DIR of a run.", flag_values=_FLAGS)
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of this step; the newest by default.", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to make; MODEL_DIR/hf/<step> by default.", flag_values=_FLAGS
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    list(hf.NUMPY_DTYPES),
    "Of the weights; float32 loses nothing.",
    flag_values=_FLAGS,
)
_MAX_SHARD_SIZE = flags.DEFINE_string(
    "max_shard_size",
    "5GB",
    "Of a file, such as 5GB or 500MB; one tensor is never split.",
    flag_values=_FLAGS,
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace an existing --output.", flag_values=_FLAGS
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare the logits of both sides on sample text; needs torch and transformers.",
    flag_values=_FLAGS,
)
_SOURCE = "bloomjax_checkpoint"  # in the header of each file
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export() -> int:
    """Writes the folder that the flags ask for. BadInput for anything that cannot be exported."""
    if not _CHECKPOINT.value:
        raise BadInput("give --checkpoint=MODEL_DIR")
    if _VERIFY.value:
        hf_verify.check_installed()
    jax.config.update("jax_platforms", "cpu")
    max_shard_bytes = parse_size(_MAX_SHARD_SIZE.value)
    with one_line_errors(f"cannot read {_CHECKPOINT.value}"):
        trained = open_model_dir(Path(_CHECKPOINT.value), _STEP.value)
    output = trained.path / "hf" / str(trained.step)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
    check_output(output, trained)
    files = small_files(trained, _DTYPE.value)
    if not _OVERWRITE.value and is_export_of(output, trained, files, _DTYPE.value, max_shard_bytes):
        print(f"{output} holds this export already: step {trained.step} in {_DTYPE.value}")
    else:
        write_folder(trained, output, files, _DTYPE.value, max_shard_bytes, _OVERWRITE.value)
    print("load it with:")
    print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"  model = AutoModelForCausalLM.from_pretrained({str(output)!r})")
    if trained.vocabulary:
        print(f"  tokenizer = AutoTokenizer.from_pretrained({str(output)!r})")
    is_equal = not _VERIFY.value or hf_verify.verify(trained, output, _DTYPE.value)
    return 0 if is_equal else 1


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9), "2GiB" (2^30), "1000". BadInput for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match.group(1)) * _UNITS[match.group(2) or ""]) if match else 0
    if size < 1:
        raise BadInput(f"--max_shard_size={text} is no size; write it like 5GB, 500MB or 2GiB")
    return size


def check_output(output: Path, trained: Trained) -> None:
    """BadInput for a place inside MODEL_DIR where something else belongs."""
    for name in ("checkpoints", "vocabulary"):
        if output.resolve().is_relative_to((trained.path / name).resolve()):
            raise BadInput(f"{output} lies in {trained.path / name}; take another folder")


def small_files(trained: Trained, dtype: str) -> dict[str, bytes]:
    """Everything but the weights, by name. BadInput for a model or vocabulary that has no such form."""
    model = trained.model.config
    files = {
        hf_folder.CONFIG: _json(hf.to_hf_config(model, trained.sequence_length, dtype)),
        "generation_config.json": _json(hf.to_hf_generation_config()),
    }
    if trained.vocabulary:
        files |= hf_tokenizer.tokenizer_files(
            trained.vocabulary, model_max_length_tokens=trained.sequence_length
        )
    return files


def write_folder(
    trained: Trained,
    output: Path,
    files: dict[str, bytes],
    dtype: str,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Makes `output` whole, or leaves what was there."""
    model = trained.model.config
    num_bytes = hf.NUMPY_DTYPES[dtype].itemsize * sum(t.num_elements for t in hf.tensors(model))
    marks = (hf_folder.CONFIG, "*.safetensors")
    with whole_folder(output, reads=trained.path, marks=marks, overwrite=overwrite) as folder:
        free_bytes = shutil.disk_usage(folder).free
        if num_bytes > free_bytes:
            raise BadInput(f"{output} needs {num_bytes:,} bytes, the disk has {free_bytes:,} left")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with tqdm(
            total=num_bytes, unit="B", unit_scale=True, desc="exporting", disable=None
        ) as bar:
            hf_folder.write_tensors(
                folder, model, dtype, max_shard_bytes, _watched(stream(trained, dtype), bar),
                {"format": "pt", _SOURCE: fingerprint_of(trained)},
            )  # fmt: skip
    shards = sorted(output.glob("*.safetensors"))
    print(
        f"{output}: step {trained.step} in {dtype}, {num_bytes:,} bytes in {len(shards)} "
        f"file{'s' if len(shards) > 1 else ''}"
    )
    if not trained.vocabulary:
        print("without a tokenizer: the model was imported without one")


def stream(trained: Trained, dtype: str) -> Iterator[np.ndarray]:
    """All numbers of the export in the order of hf.tensors, cast to `dtype`.

    BadInput if the checkpoint is damaged, or a number does not fit into `dtype`.
    """
    reader = ParamsReader(trained.checkpoint, trained.position)
    folds = widths_of(trained.model.config).folds()
    for tensor in hf.tensors(trained.model.config):
        if tensor.layer is not None:
            block = reader.read(tensor.path, tensor.layer, tensor.layer + 1)[0]
            if not np.isfinite(block).all():
                reader.check(tensor.path)  # damage makes NaN and infinity, too
            if tensor.path in folds:
                block = block * folds[tensor.path]
            yield tensor.to_hf(_cast(block, dtype, tensor.name))
            continue
        for start, stop in reader.blocks(tensor.path):
            block = reader.read(tensor.path, start, stop)[: max(0, tensor.shape[0] - start)]
            if not np.isfinite(block).all():
                reader.check(tensor.path)
            if tensor.path in folds:
                block = block * folds[tensor.path]
            yield _cast(block, dtype, tensor.name)


def _cast(block: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = block.astype(hf.NUMPY_DTYPES[dtype], copy=False)
    if not np.isfinite(cast).all():
        if np.isfinite(block).all():
            raise BadInput(f"{name} does not fit into {dtype}; take --dtype=float32")
        raise BadInput(f"{name} has values that are not finite")
    return cast


def _watched(blocks: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        bar.update(block.nbytes)


def fingerprint_of(trained: Trained) -> str:
    """The parameters' fingerprints, joined: what tells the export of one checkpoint from that of another."""
    saved = trained.position["fingerprints"]
    names = sorted(name for name in saved if name.startswith(".params"))
    return "-".join(f"{saved[name]:08x}" for name in names)


def is_export_of(
    output: Path, trained: Trained, files: dict[str, bytes], dtype: str, max_shard_bytes: int
) -> bool:
    """Whether `output` is a whole export of this checkpoint, in `dtype` and in files of this size."""
    try:
        source = hf_folder.metadata(output).get(_SOURCE)
        same = all((output / name).read_bytes() == content for name, content in files.items())
        hf_folder.HFFolder(output)  # every tensor is there
    except (BadInput, OSError):
        return False
    itemsize = hf.NUMPY_DTYPES[dtype].itemsize
    shards = hf_folder.plan_shards(hf.tensors(trained.model.config), itemsize, max_shard_bytes)
    num_files = len(list(output.glob("*.safetensors")))
    return same and source == fingerprint_of(trained) and num_files == len(shards)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(export, argv, _FLAGS)


if __name__ == "__main__":
    main()
