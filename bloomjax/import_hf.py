"""A Hugging Face BLOOM as a checkpoint: `python -m bloomjax.import_hf --input=DIR --output=MODEL_DIR`.

The result is a MODEL_DIR at step 0: `train` goes on from it, `generate` and `export` read it. Nothing of the folder is
executed. The weights pass through memory one tensor at a time.
"""

import contextlib
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags
from tqdm import tqdm

from bloomjax import config, hf, hf_tokenizer, hf_verify
from bloomjax.checkpoint_arrays import ParamsWriter
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors, whole_folder
from bloomjax.hf_folder import HFFolder
from bloomjax.metrics import lock_model_dir
from bloomjax.model_dir import open_model_dir
from bloomjax.vocabulary import Vocabulary, open_vocabulary

_FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
    "input", None, "Folder with config.json and *.safetensors.", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string("output", None, "MODEL_DIR to make.", flag_values=_FLAGS)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace an existing --output.", flag_values=_FLAGS
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare the logits of both sides on sample text; needs torch and transformers.",
    flag_values=_FLAGS,
)


def import_hf() -> int:
    """Makes the MODEL_DIR that the flags ask for. BadInput for anything that is no whole BLOOM."""
    if not _INPUT.value or not _OUTPUT.value:
        raise BadInput("give --input=DIR with a Hugging Face BLOOM and --output=MODEL_DIR")
    if _VERIFY.value:
        hf_verify.check_installed()
    jax.config.update("jax_platforms", "cpu")
    output = Path(_OUTPUT.value)
    with one_line_errors(f"cannot read {_INPUT.value}"):
        source = HFFolder(Path(_INPUT.value))
        vocabulary = find_vocabulary(source)
    with one_line_errors(f"cannot write {output}"), contextlib.ExitStack() as stack:
        if _OVERWRITE.value and (output / "checkpoints").is_dir():
            stack.enter_context(lock_model_dir(output))  # a run may be going on there
        num = write_model_dir(source, vocabulary, output, overwrite=_OVERWRITE.value)
    print(
        f"{output}: {num:,} parameters of {source.path} ({', '.join(sorted(source.dtypes))}) in float32"
    )
    if "F64" in source.dtypes:
        print("float64 was rounded to float32")
    if vocabulary:
        print(f"vocabulary: {vocabulary.path.name}, {vocabulary.size:,} tokens")
    else:
        print(f"{source.path} has no tokenizer: give --gin.VOCABULARY when you train")
    print("go on training with:")
    gin_file = shlex.quote(f"--gin_file={output}/config.gin")
    print(
        f"  python -m bloomjax.train {gin_file} --gin_file=continue.gin --gin.TEXT_DIR=\"'my_text'\""
    )
    is_equal = not _VERIFY.value or hf_verify.verify(open_model_dir(output), source.path, "float32")
    return 0 if is_equal else 1


def find_vocabulary(source: HFFolder) -> Vocabulary | None:
    """The folder's tokenizer; BadInput if it has more tokens than the embedding has rows."""
    path = hf_tokenizer.find_vocabulary(source.path)
    if path is None:
        return None
    vocabulary = open_vocabulary(path)
    if vocabulary.size > source.config.vocab_size:
        raise BadInput(
            f"{path} has {vocabulary.size} tokens, the embedding only {source.config.vocab_size} rows"
        )
    return vocabulary


def write_model_dir(
    source: HFFolder, vocabulary: Vocabulary | None, output: Path, *, overwrite: bool
) -> int:
    """Makes `output` whole, or leaves what was there; the number of parameters."""
    num = sum(tensor.num_elements for tensor in source.tensors)
    marks = ("config.gin", "checkpoints")
    with whole_folder(output, reads=source.path, marks=marks, overwrite=overwrite) as folder:
        # The numbers as they arrive, and the checkpoint that is made of them.
        needed_bytes, free_bytes = 2 * 4 * num, shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise BadInput(
                f"{output} needs {needed_bytes:,} bytes, half of them for a while; the disk has {free_bytes:,} left"
            )
        source.check_head()
        scratch = folder / "scratch"
        writer = ParamsWriter(scratch, hf.leaf_shapes(source.config))
        with tqdm(total=num, unit="", unit_scale=True, desc="importing", disable=None) as bar:
            for tensor in source.tensors:
                for start, block in source.blocks(tensor):
                    if tensor.layer is not None:
                        start, block = tensor.layer, tensor.from_hf(block)[None]
                    writer.write(tensor.path, start, block)
                    bar.update(block.size)
        writer.save(folder / "checkpoints", position(source, vocabulary))
        shutil.rmtree(scratch)
        if vocabulary:
            (folder / "vocabulary").mkdir()
            shutil.copyfile(vocabulary.path, folder / "vocabulary" / vocabulary.path.name)
        (folder / "config.gin").write_text(gin_config(source, vocabulary, output))
    return num


def position(source: HFFolder, vocabulary: Vocabulary | None) -> dict:
    """What the checkpoint says about itself, as far as an imported model knows."""
    c = source.config
    return {
        "samples": 0,
        "model": {
            "vocab_size": c.vocab_size,
            "num_layers": c.num_layers,
            "emb_dim": c.emb_dim,
            "num_heads": c.num_heads,
        },
        "data": {"vocabulary": vocabulary.fingerprint if vocabulary else None},
        "imported": {"source": str(source.path), "sequence_length": source.sequence_length},
    }


def gin_config(source: HFFolder, vocabulary: Vocabulary | None, model_dir: Path) -> str:
    """config.gin: the shape of the model, and where its data will lie."""
    c = source.config
    lines = [
        f"# Imported from {str(source.path)!r} by bloomjax.import_hf; how to go on: continue.gin",
        "include 'bloom.gin'",
        "include 'pretrain.gin'",
        "",
        f"MODEL_DIR = {str(model_dir)!r}",
        f"STORE_DIR = {str(model_dir / 'tokens')!r}",
        f"VOCAB_SIZE = {c.vocab_size}",
        f"NUM_LAYERS = {c.num_layers}",
        f"EMB_DIM = {c.emb_dim}",
        f"NUM_HEADS = {c.num_heads}",
        f"SEQUENCE_LENGTH = {source.sequence_length}",
        f"BloomConfig.init_std = {c.init_std}",
        f"BloomConfig.layer_norm_epsilon = {c.layer_norm_epsilon}",
        f"BloomConfig.hidden_dropout_rate = {c.hidden_dropout_rate}",
        f"BloomConfig.attention_dropout_rate = {c.attention_dropout_rate}",
        "# The weights and the vocabulary are in MODEL_DIR: nothing is made anew if it is not found.",
        "train.needs_checkpoint = True",
        "prepare.makes_vocabulary = False",
        f"prepare.vocab_size = {vocabulary.size if vocabulary else c.vocab_size}",
    ]
    if vocabulary:
        lines += [
            f"BloomConfig.num_tokens_in_vocab = {vocabulary.size}",
            f"VOCABULARY = {str(model_dir / 'vocabulary' / vocabulary.path.name)!r}",
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(import_hf, argv, _FLAGS)


if __name__ == "__main__":
    main()
