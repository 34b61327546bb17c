"""The run from first line to last: `python -m bloomjax.train --gin_file=tiny.gin`."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import config, flops, partitioning
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import EvalData, OpenTrainData, TrainData, check_filled_shares
from bloomjax.errors import BadInput
from bloomjax.health import StopSignals
from bloomjax.metrics import ScalarWriter
from bloomjax.model import Bloom
from bloomjax.run import Run
from bloomjax.schedules import BatchSchedule, CosineSchedule, run_length_steps
from bloomjax.startup import keep_freed_memory, use_compilation_cache
from bloomjax.token_store import store_exists
from bloomjax.train_step import (
    StepOptions,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)
from bloomjax.vocabulary import Vocabulary, open_vocabulary


def train(
    *,
    model: Bloom,
    optimizer: optax.GradientTransformation,
    learning_rate: CosineSchedule,
    batch_schedule: BatchSchedule,
    train_data: TrainData,
    eval_data: EvalData,
    mesh: partitioning.MeshShape,
    step: StepOptions,
    checkpoints: Checkpoints,
    model_dir: str,
    vocabulary_path: str,
    seed: int,
    eval_every_steps: int,
    train_steps: int | None = None,
    train_samples: int | None = None,
    prepare: Callable[..., Any] | None = None,
    writer: Callable[[str], ScalarWriter] | None = None,
    sample_prompts: Sequence[str] = (),
    compilation_cache_dir: str | None = None,
    reuse_host_memory: bool = False,
) -> int:
    """Trains up to `train_steps` (or `train_samples`), from the newest whole checkpoint in `model_dir` if there is one.

    Args:
      learning_rate: of the samples consumed before a step.
      eval_data, eval_every_steps: held-out loss by language before step 1, at this interval and at the end.
      step: microbatches and the like.
      vocabulary_path: of the store's vocabulary; copied to model_dir/vocabulary.
      seed: of initial weights and dropout; the order of data has its own (TrainData).
      prepare: what makes a missing store; started once as `python -m bloomjax.prepare` with the same flags.
      writer: makes the TensorBoard writer of a folder.
      sample_prompts: continued by the model at the end.
      compilation_cache_dir: where compiled programs are kept between runs; None for ~/.cache/bloomjax/xla.
      reuse_host_memory: keep freed memory in the process; for training on a CPU, see `keep_freed_memory`.

    Returns:
      Exit code: 0 when all is trained, 75 when a signal stopped the run after saving, that of `prepare` if it failed.

    Raises:
      BadInput: anything given does not fit together; nothing was overwritten.
    """
    # ---- mesh ----
    if reuse_host_memory:
        keep_freed_memory()
    use_compilation_cache(compilation_cache_dir)
    device_mesh = mesh.build()
    check_model(model, device_mesh, train_data.sequence_length)
    num_steps = run_length_steps(batch_schedule, train_steps, train_samples)
    multiple = step.row_multiple(device_mesh)
    filled = check_filled_shares(batch_schedule, num_steps, multiple, train_data.max_filled_share)

    # ---- data ----
    if prepare is not None and not store_exists(train_data.store_dir):
        code = prepare_in_subprocess()
        if code:
            return code  # it has said why
    data = train_data.open()
    vocabulary = open_matching_vocabulary(vocabulary_path, data, model)
    eval_batches = list(eval_data.batches(data, device_mesh))

    # ---- abstract state, shardings, programs ----
    abstract = abstract_state(model, optimizer, device_mesh)
    init, train_step, eval_step = jit_programs(model, optimizer, step, device_mesh, abstract)

    # ---- restore ----
    run = Run(
        model_dir=Path(model_dir), num_steps=num_steps, eval_every_steps=eval_every_steps, model=model,
        batch_schedule=batch_schedule, learning_rate=learning_rate, data=data, mesh=device_mesh,
        checkpoints=checkpoints, writer=writer,
    )  # fmt: skip
    state = run.restore(abstract)
    if state is None:
        state = init(seed)
    run.announce(state, filled)
    keep_vocabulary(vocabulary, run.model_dir)

    # ---- loop ----
    dropout_key = jax.random.key(seed + 1)
    # Whatever ends the loop, a checkpoint that is being written gets finished.
    with jax.set_mesh(device_mesh), StopSignals() as signals, contextlib.closing(checkpoints):
        batches = data.batches(run.step + 1, num_steps, batch_schedule, device_mesh, multiple)
        while True:
            # Stop before all else: a job that was told to end has little time. Save before evaluating:
            # BLOOM lost 30 hours to evaluations that hung before the save.
            if signals.received or checkpoints.is_due(run.step) or run.step >= num_steps:
                run.save(state)
            if signals.received:
                return run.stop(signals.received)
            if run.is_evaluation_due():
                run.evaluate(eval_step, state.params, eval_batches)
            if run.step >= num_steps:
                break
            _, batch = next(batches)
            rate = np.float32(learning_rate(batch_schedule.samples_after(run.step)))
            state, metrics = train_step(state, batch, rate, dropout_key)
            run.finish_step(metrics)
    run.finish(state, vocabulary, sample_prompts)
    return 0


def jit_programs(
    model: Bloom,
    optimizer: optax.GradientTransformation,
    step: StepOptions,
    mesh: Mesh,
    abstract: TrainState,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """init(seed), train_step (gives its state away) and eval_step, with the shardings of `abstract`."""
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    replicated = NamedSharding(mesh, PartitionSpec())
    init = jax.jit(functools.partial(init_state, model, optimizer), out_shardings=state_shardings)
    train_step = jax.jit(
        make_train_step(model, optimizer, step, mesh),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated),
    )
    eval_step = jax.jit(make_eval_step(model, step), out_shardings=replicated)
    return init, train_step, eval_step


def check_model(model: Bloom, mesh: Mesh, sequence_length: int) -> None:
    """BadInput if the mesh does not divide the model, or the parameters are not as many as expected."""
    c = model.config
    mlp_dim = c.mlp_dim or 4 * c.emb_dim
    partitioning.check_divisible(
        mesh, sequence_length=sequence_length, vocab_size=c.vocab_size, num_heads=c.num_heads,
        mlp_dim=mlp_dim, emb_dim=c.emb_dim,
    )  # fmt: skip
    num = flops.num_params(
        vocab_size=c.vocab_size, emb_dim=c.emb_dim, num_layers=c.num_layers, mlp_dim=mlp_dim
    )
    if c.expected_params is not None and num != c.expected_params:
        raise BadInput(
            f"this shape has {num:,} parameters, expected_params says {c.expected_params:,}"
        )


def prepare_in_subprocess() -> int:
    """Makes vocabulary and token store in a process of its own, so that this one never loads TensorFlow."""
    command = [sys.executable, "-m", "bloomjax.prepare", *config.arguments()]
    return 0 if jax.process_index() else abs(subprocess.run(command, check=False).returncode)


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
    return vocabulary


def keep_vocabulary(vocabulary: Vocabulary, model_dir: Path) -> None:
    target = model_dir / "vocabulary" / vocabulary.path.name
    if jax.process_index() == 0 and not target.exists():
        target.parent.mkdir(exist_ok=True)
        beside = model_dir / f".{target.name}.tmp"
        shutil.copyfile(vocabulary.path, beside)
        os.replace(beside, target)


if __name__ == "__main__":
    config.run("train")
