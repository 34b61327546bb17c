"""What is checked and made before the first step of a run: model against mesh, token store, vocabulary."""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from bloomjax import config, flops, job, partitioning
from bloomjax.data import OpenTrainData
from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.kernel_check import check_attention_kernel
from bloomjax.model import Bloom
from bloomjax.objectives import CausalLM, Objective
from bloomjax.token_store import store_exists
from bloomjax.vocabulary import Vocabulary, open_vocabulary


def check_model(model: Bloom, mesh: Mesh, sequence_lengths: Iterable[int]) -> None:
    """BadInput if the mesh does not divide the model, it has too few positions, or not the parameters expected."""
    c = model.config
    for length in sequence_lengths:
        c.positions.check_length(length)
        partitioning.check_divisible(
            mesh, sequence_length=length, vocab_size=c.vocab_size, num_heads=c.num_heads,
            mlp_dim=c.mlp_width, emb_dim=c.emb_dim,
        )  # fmt: skip
    num = flops.num_params(**c.shape)
    if c.expected_params is not None and num != c.expected_params:
        raise BadInput(
            f"this shape has {num:,} parameters, expected_params says {c.expected_params:,}"
        )


def check_device(
    model: Bloom,
    mesh: Mesh,
    compiler_options: Mapping[str, bool | int | str] | None,
    objective: Objective = CausalLM(),  # noqa: B008 # immutable
) -> None:
    """BadInput if this platform's compiler does not know an option, or the attention kernel fails or is wrong here.

    Both before minutes go into the model.
    """
    try:
        jax.jit(lambda x: x, compiler_options=dict(compiler_options or {})).lower(0.0).compile()
    except (jax.errors.JaxRuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"StepOptions.compiler_options on {jax.default_backend()}: {reason}"
        ) from None
    c = model.config
    difference = check_attention_kernel(
        c.attention_kernel, c.num_heads, c.head_dim, c.dtype, mesh.local_devices[0],
        has_masks=c.document_end_id is not None or "last_key" in objective.arrays,
    )  # fmt: skip
    if difference is not None and job.is_main():
        print(f"attention kernel {c.attention_kernel}: within {difference:.1e} of float32 scores")


def prepare_if_needed(store_dir: str, text_dir: str | None) -> int:
    """Makes vocabulary and token store where there is none; given `text_dir` it also checks the one there is.

    On process 0; the others wait. Its exit code.
    """
    return job.on_main(
        lambda: prepare_in_subprocess() if text_dir or not store_exists(store_dir) else 0
    )


def prepare_in_subprocess() -> int:
    """In a process of its own, so that this one never loads TensorFlow."""
    command = [sys.executable, "-m", "bloomjax.prepare", *config.arguments(), "--nowarn_unused"]
    return abs(subprocess.run(command, check=False).returncode)


def open_matching_vocabulary(path: str, data: OpenTrainData, model: Bloom) -> Vocabulary:
    """The vocabulary; BadInput unless it is the one that made the store and fits the embedding."""
    vocabulary = open_vocabulary(path)
    if vocabulary.fingerprint != data.store.vocabulary_fingerprint:
        raise BadInput(
            f"vocabulary {path} (sha256 {vocabulary.fingerprint[:12]}) did not make the store {data.store.path} "
            f"(sha256 {data.store.vocabulary_fingerprint[:12]})"
        )
    if vocabulary.size > model.config.vocab_size:
        raise BadInput(
            f"vocabulary {path} has {vocabulary.size} tokens, the embedding only {model.config.vocab_size} rows "
            "(BloomConfig.vocab_size)"
        )
    if data.objective.num_ids() > model.config.vocab_size:
        raise BadInput(
            f"{type(data.objective).__name__} needs {data.objective.num_ids()} token ids, the embedding has only "
            f"{model.config.vocab_size} rows (BloomConfig.vocab_size)"
        )
    return vocabulary


def keep_vocabulary(vocabulary: Vocabulary, model_dir: Path) -> None:
    """The run's own copy (process 0's), in place of one that a start before the first checkpoint may have left."""
    if not job.is_main():
        return
    target = model_dir / "vocabulary" / vocabulary.path.name
    if target.exists() and open_vocabulary(target).fingerprint == vocabulary.fingerprint:
        return
    shutil.rmtree(target.parent, ignore_errors=True)
    write_whole(target, vocabulary.path.read_bytes())
