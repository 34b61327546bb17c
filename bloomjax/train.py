"""The run from first line to last: `python -m bloomjax.train --gin_file=tiny.gin`."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from bloomjax import config, partitioning
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import EvalData, TrainData, check_filled_shares
from bloomjax.distributed import Cluster
from bloomjax.errors import BadInput
from bloomjax.guard import RollBack
from bloomjax.health import Health
from bloomjax.language_noise import LanguageNoise
from bloomjax.metrics import ScalarWriter
from bloomjax.model import Bloom
from bloomjax.preflight import (
    check_device,
    check_model,
    keep_vocabulary,
    open_matching_vocabulary,
    prepare_if_needed,
)
from bloomjax.reweighting import DoReMi
from bloomjax.run import Run
from bloomjax.schedules import BatchSchedule, CosineSchedule, run_length_steps
from bloomjax.startup import begin_process
from bloomjax.train_state import TrainState, abstract_state
from bloomjax.train_step import Batch, StepOptions, jit_programs
from bloomjax.vocabulary import Vocabulary


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
    health: Health | None = None,
    language_noise: LanguageNoise | None = None,
    reweighting: DoReMi | None = None,
    cluster: Cluster | None = None,
    needs_checkpoint: bool = False,
    prepare: Callable[..., Any] | None = None,
    text_dir: str | None = None,
    writer: Callable[[str, int], ScalarWriter] | None = None,
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
      health, reweighting: what watches over the run, and what weighs its languages (None: every token counts alike).
      language_noise: measures the gradient noise of one language after the other.
      cluster: joins the processes of the job, if there are several; None in a process that is alone.
      needs_checkpoint: refuse to start anew; of an imported model.
      prepare: if bound, a missing store is made, by `python -m bloomjax.prepare` with the same flags.
      text_dir: if given, that also checks that an existing store was made from this text.
      writer: makes the TensorBoard writer of a folder, given the first step it will see.
      sample_prompts: continued by the model at the end.
      compilation_cache_dir: where compiled programs are kept between runs; None for ~/.cache/bloomjax/xla.
      reuse_host_memory: keep freed memory in the process; for training on a CPU, see `keep_freed_memory`.

    Returns:
      Exit code: 0 when all is trained or the kill switch is there, 75 after any other stop, that of a failed `prepare`.

    Raises:
      BadInput: anything given does not fit together; nothing was overwritten.
      Restart: the state in memory is no good, or cannot be saved; the last checkpoint is.
    """
    # ---- processes, mesh ----
    begin_process(cluster, reuse_host_memory, compilation_cache_dir)
    device_mesh = mesh.build()
    check_model(model, device_mesh, train_data.sequence_lengths)
    check_device(model, device_mesh, step.compiler_options, train_data.objective)
    num_steps = run_length_steps(batch_schedule, train_steps, train_samples)
    num_rows = functools.partial(step.num_rows, mesh=device_mesh)
    filled = check_filled_shares(batch_schedule, num_steps, num_rows, train_data.max_filled_share)

    # ---- data ----
    if prepare is not None and (code := prepare_if_needed(train_data.store_dir, text_dir)):
        return code  # it has said why
    data = train_data.open()
    filled += data.check_phases(batch_schedule, num_steps, num_rows)
    vocabulary = open_matching_vocabulary(vocabulary_path, data, model)
    eval_batches = list(eval_data.batches(data, device_mesh))

    # ---- abstract state, shardings, programs ----
    abstract = abstract_state(model, optimizer, device_mesh)
    programs = jit_programs(model, optimizer, step, device_mesh, abstract)

    # ---- restore, loop ----
    health = health or Health()
    if health.stops.open(Path(model_dir)):
        print(f"nothing is done while the kill switch {health.stops.kill_switch} is there")
        return 0
    with health.stops, Run(
        model_dir=model_dir, num_steps=num_steps, eval_every_steps=eval_every_steps, model=model,
        batch_schedule=batch_schedule, learning_rate=learning_rate, data=data, mesh=device_mesh,
        checkpoints=checkpoints, health=health, writer=writer, config_text=config.operative_config(),
        language_noise=language_noise and language_noise.open(model, step, device_mesh, data),
        reweighting=reweighting and reweighting.open(model, step, device_mesh, data, abstract.params),
    ) as run:  # fmt: skip
        state = None
        while state is None:
            state = attempt(
                run, abstract, programs, seed, needs_checkpoint, eval_batches, vocabulary, filled,
                lambda: data.batches(run.step + 1, num_steps, batch_schedule, device_mesh, num_rows),
            )  # fmt: skip
        if health.stops.stopped_by and not run.is_done():
            return run.stop(state)
        run.finish(state, vocabulary, sample_prompts)
    return 0


def attempt(
    run: Run,
    abstract: TrainState,
    programs: Sequence[Callable[..., Any]],
    seed: int,
    needs_checkpoint: bool,
    eval_batches: Sequence[tuple[list[str], Batch]],
    vocabulary: Vocabulary,
    filled: Sequence[str],
    batches_from_here: Callable[[], Generator[tuple[int, Batch], None, None]],
) -> TrainState | None:
    """Restores and steps; None after a roll back, when there is an earlier state to go on from."""
    init, from_params, train_step, eval_step = programs
    state = run.restore(abstract, from_params)
    if state is None and needs_checkpoint:
        raise BadInput(
            f"{run.model_dir} has no checkpoint to go on from; was it moved? set --gin.MODEL_DIR"
        )
    if state is None:
        state = init(seed)
    run.announce(state, filled)
    keep_vocabulary(vocabulary, run.model_dir)
    batches = batches_from_here()
    key = jax.random.key(seed + 1)
    try:
        with jax.set_mesh(run.mesh), contextlib.closing(batches):
            return loop(run, state, train_step, eval_step, batches, eval_batches, key)
    except RollBack as back:
        run.roll_back(back)
        return None


def loop(
    run: Run,
    state: TrainState,
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    batches: Iterator[tuple[int, Batch]],
    eval_batches: Sequence[tuple[list[str], Batch]],
    dropout_key: jax.Array,
) -> TrainState:
    """Steps until all are done or the run has to stop; the last state is saved."""
    while True:
        # Stop before all else: a job that was told to end has little time. Save before evaluating:
        # BLOOM lost 30 hours to evaluations that hung before the save.
        is_stopping = run.is_stop_due()
        if run.is_save_due() or is_stopping:
            run.save(state)
        if is_stopping:
            return state
        if run.is_evaluation_due():
            run.evaluate(eval_step, state.params, eval_batches)
        if run.is_done():
            return state
        _, batch = next(batches)
        batch = run.begin_step(batch, state)
        rate, limits = run.next_learning_rate(), run.next_limits()
        with run.dispatching(batch):
            state, metrics = train_step(state, batch, rate, dropout_key, limits)
        state = run.finish_step(state, metrics)


if __name__ == "__main__":
    config.run("train")
