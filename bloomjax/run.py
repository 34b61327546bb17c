"""Where a run stands and what it writes down: position, metrics, journal, checkpoints, words on the screen."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

import bloomjax
from bloomjax import decoding, flops, job, language_report
from bloomjax.checkpoints import Checkpoints, is_imported
from bloomjax.data import OpenTrainData
from bloomjax.errors import EXIT_RESTART, BadInput
from bloomjax.files import write_whole
from bloomjax.journal import Journal
from bloomjax.metrics import MetricsFile, Progress, ScalarWriter, lock_model_dir
from bloomjax.model import Bloom
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.train_step import Batch, TrainState
from bloomjax.vocabulary import Vocabulary


class Run:
    """The bookkeeping of `train`; it counts the steps, and nothing in it changes the mathematics.

    The record of a step is written when the next one has been dispatched, so that the device never waits for the host.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        num_steps: int,
        eval_every_steps: int,
        batch_schedule: BatchSchedule,
        learning_rate: CosineSchedule,
        model: Bloom,
        data: OpenTrainData,
        mesh: Mesh,
        checkpoints: Checkpoints,
        writer: Callable[[str, int], ScalarWriter] | None,
        config_text: str,
    ):
        self.model_dir = Path(model_dir)
        self.step = 0
        self._num_steps = num_steps
        self._eval_every_steps = eval_every_steps
        self._batch_schedule = batch_schedule
        self._learning_rate = learning_rate
        self._model = model
        self._data = data
        self._checkpoints = checkpoints
        self._is_main = job.is_main()
        self._pending: dict[str, Any] | None = None  # record of the newest step
        self._make_writer = writer
        self._config_text = config_text
        self._writer: ScalarWriter | None = None
        self._flops_per_token = self._flops_per_token_of(data.sequence_length)
        # The hash chain over the samples so far, and where it stood at the save before: (samples, value).
        self._chain, self._chain_before = (0, 0), (0, 0)
        self._num_devices = mesh.devices.size
        self._device_kind = mesh.devices.flat[0].device_kind
        self._clock = time.monotonic()
        self._origin = "starts"
        self._was_done = False
        self._progress: Progress | None = None  # on the main process, while there are steps to do
        if eval_every_steps < 1:
            raise BadInput(f"eval_every_steps must be at least 1, got {eval_every_steps}")
        self._lock = lock_model_dir(model_dir) if self._is_main else None
        self._metrics = MetricsFile(self.model_dir, self._is_main)
        self._journal = Journal(self.model_dir, self._is_main)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        """Whatever ends the run, a checkpoint that is being written gets finished, and the folder is free again."""
        del kind, trace
        if job.is_lost_peer(error):
            return  # no save is finished without it, and the process ends at once
        try:
            self._checkpoints.close()
            if self._writer:
                self._writer.close()
            if self._progress:
                self._progress.close()
        finally:
            if self._lock:
                self._lock.close()

    def _flops_per_token_of(self, sequence_length: int) -> flops.FlopCount:
        c = self._model.config
        return flops.flops_per_token(
            vocab_size=c.vocab_size, emb_dim=c.emb_dim, num_layers=c.num_layers,
            mlp_dim=c.mlp_width, sequence_length_tokens=sequence_length,
        )  # fmt: skip

    # What a checkpoint must agree with.
    def _identity(self, num_samples: int) -> dict[str, Any]:
        shape = dataclasses.asdict(self._model.config)
        names = ("vocab_size", "num_layers", "emb_dim", "num_heads", "mlp_dim")
        return {
            "model": {name: shape[name] for name in names},
            "data": self._data.identity(num_samples),
        }

    def _check_position(self, position: dict[str, Any]) -> None:
        for kind, mine in self._identity(position["samples"]).items():
            theirs = position[kind]
            names = mine | theirs
            if is_imported(position):  # what it does not know it cannot contradict
                names = [name for name in mine if theirs.get(name) is not None]
            changed = [name for name in names if mine.get(name) != theirs.get(name)]
            if changed:
                was = ", ".join(f"{n}={_brief(theirs.get(n))}" for n in changed)
                now = ", ".join(f"{n}={_brief(mine.get(n))}" for n in changed)
                raise BadInput(
                    f"MODEL_DIR {self.model_dir} holds a run with other {kind}: there {was}, here {now}; "
                    "take another MODEL_DIR"
                )
        step, samples = position["step"], position["samples"]
        if self._batch_schedule.samples_after(step) != samples:
            raise BadInput(
                f"MODEL_DIR {self.model_dir} had consumed {samples} samples after step {step}; this batch schedule "
                f"says {self._batch_schedule.samples_after(step)}"
            )
        if "chain" in position:
            self._check_chain(*map(tuple, position["chain"]))

    def _check_chain(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        """Whether this program deals the samples since the save before as the one did that trained on them."""
        (first, value), (samples, expected) = before, now
        if self._data.mixture.chain(value, first, samples - first) != expected:
            raise BadInput(
                f"MODEL_DIR {self.model_dir} was trained on other samples between {first} and {samples} than this "
                "program and configuration would take: their order has changed; use the version that began the run"
            )
        self._chain_before, self._chain = now, now

    def restore(
        self, abstract: TrainState, from_params: Callable[[Any], TrainState]
    ) -> TrainState | None:
        """The state to go on from; None to start anew. `from_params` makes one of imported parameters."""
        self._checkpoints.open(self.model_dir / "checkpoints")
        restored = self._checkpoints.restore(abstract, self._check_position, from_params)
        for problem in self._checkpoints.problems:
            self._journal.write("damaged_checkpoint", problem=problem)
        state = None
        if restored is not None:
            state, position = restored
            self.step = position["step"]
            if is_imported(position):
                self._origin = f"starts from {position['imported']['source']}"
                self._chain = self._chain_before = (
                    0,
                    0,
                )  # a damaged checkpoint may have been looked at
                self._metrics.resume_after(-1)
                return state
        self._metrics.resume_after(self.step if state else -1)
        last = job.on_main(self._metrics.last)
        if state and (not last or last["step"] < self.step or self._lacks_evaluation(last)):
            # The process died between saving this step and writing its record.
            self._metrics.resume_after(self.step - 1)
            self._pending = position["record"]
        self._was_done = state is not None and self.is_done()
        return state

    def announce(self, state: TrainState, filled: list[str]) -> None:
        """The parameter table, what a step is, and from where the run goes on."""
        here = {
            "host": os.uname().nodename, "pid": os.getpid(), "devices": [d.id for d in jax.local_devices()]
        }  # fmt: skip
        processes = job.gather(here)
        self._journal.write(
            "start", step=self.step, samples=self.samples, num_steps=self._num_steps, pid=here["pid"],
            host=here["host"], device=self._device_kind, num_devices=self._num_devices,
            jax=jax.__version__, bloomjax=bloomjax.__version__, processes=processes,
        )  # fmt: skip
        if self._is_main:
            if self._config_text.strip():  # empty when no gin file was read
                write_whole(self.model_dir / "config.gin", self._config_text.encode())
            if self._make_writer:
                self._writer = self._make_writer(str(self.model_dir), self.step + 1)
                self._writer.write_texts(self.step, {"config": self._config_text})
        if self.is_done() or not self._is_main:
            return
        batch_size = self._batch_schedule.batch_size(self.step + 1)
        if self.step == 0:
            print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        print(
            f"{self._num_devices} x {self._device_kind}{_spread(len(processes))}; batch {batch_size} samples = "
            f"{batch_size * self._data.sequence_length_of(self.samples):,} tokens a step; "
            f"{self._flops_per_token.causal:,.0f} "
            f"FLOPs a token (causal), {self._flops_per_token.megatron_model:,.0f} (Megatron), "
            f"{self._flops_per_token.six_n:,.0f} (6N)"
        )
        for line in filled:
            print(line)
        start = f"goes on after step {self.step}" if self.step else self._origin
        print(f"{self.model_dir}: {start}, {self._num_steps} steps in all", flush=True)
        self._progress = Progress(self.step, self._num_steps)

    @property
    def samples(self) -> int:
        return self._batch_schedule.samples_after(self.step)

    def finish_step(self, metrics: dict[str, jax.Array]) -> None:
        """Counts the step just dispatched and writes the record of the one before."""
        self._flush()
        self.step += 1
        first, value = self._chain
        value = self._data.mixture.chain(value, first, self.samples - first)
        self._chain = self.samples, value
        self._pending = self._record() | {
            "batch_size": self._batch_schedule.batch_size(self.step),
            **metrics,
        }

    def _record(self) -> dict[str, Any]:
        samples = self.samples
        return {
            "step": self.step,
            "samples": samples,
            "tokens": self._data.mixture.tokens_after(samples),
            "learning_rate": self._learning_rate(samples),
        }

    def _complete(self) -> None:
        """Waits for the newest step and puts its numbers into its record."""
        record = self._pending
        if record is None or "seconds" in record or "loss" not in record:
            return
        record["loss"], record["grad_norm"] = float(record["loss"]), float(record["grad_norm"])
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            self._give_up(record)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        length = self._data.sequence_length_of(record["samples"] - 1)
        rate = record["batch_size"] * length / seconds
        peak = flops.peak_flops_per_second(self._device_kind)
        flops_per_token = self._flops_per_token_of(length).causal
        mfu = flops.mfu(rate * flops_per_token, 1.0, self._num_devices, peak)
        record |= {
            "tokens_per_second": round(rate, 1),
            "mfu": round(mfu, 4) if mfu else None,
            "seconds": round(seconds, 4),
        }
        if self._progress:
            self._progress.update(record["step"], record["loss"], rate)

    def _give_up(self, record: dict[str, Any]) -> None:
        """Before anything of this step is saved: a few NaN checkpoints would push out the last good one."""
        self._pending = None
        first = record["samples"] - record["batch_size"]
        fields = {"loss": str(record["loss"]), "grad_norm": str(record["grad_norm"])}
        samples = [first, record["samples"]]
        self._journal.write("not_finite", step=record["step"], samples=samples, **fields)
        raise BadInput(
            f"step {record['step']} (samples {first} to {record['samples'] - 1}) has loss {record['loss']} and "
            f"gradient norm {record['grad_norm']}; stopped, nothing of it is saved in {self.model_dir}"
        )

    def _flush(self) -> None:
        self._complete()
        record, self._pending = self._pending, None
        if record is None:
            return
        self._metrics.write(record)
        if self._writer:
            scalars = {
                k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"
            }
            for key in ("loss_by_language", "bits_per_byte_by_language", "epochs_by_language"):
                scalars |= {f"{key}/{name}": x for name, x in record.get(key, {}).items()}
            self._writer.write_scalars(record["step"], scalars)
            if "bits_per_byte_by_language" in record:
                shares = language_report.declared_shares(self._data.mixture, record["samples"])
                table = language_report.markdown_table(record, shares)
                self._writer.write_texts(record["step"], {"languages": table})

    def save(self, state: TrainState) -> None:
        if self.step == 0:
            return
        self._complete()
        started = time.monotonic()
        chain = [self._chain_before, self._chain]
        position = {"samples": self.samples, "record": self._pending, "chain": chain}
        if not self._checkpoints.save(self.step, state, position | self._identity(self.samples)):
            return
        self._chain_before = self._chain
        if self._writer:
            self._writer.flush()
        self._journal.write(
            "save", step=self.step, samples=self.samples, stall_seconds=round(time.monotonic() - started, 3)
        )  # fmt: skip
        self._clock += time.monotonic() - started

    def is_done(self) -> bool:
        return self.step >= self._num_steps

    def next_learning_rate(self) -> np.float32:
        """Of the step to come: that of the samples consumed before it."""
        return np.float32(self._learning_rate(self.samples))

    def is_save_due(self) -> bool:
        return self.is_done() or self._checkpoints.is_due(self.step)

    def is_evaluation_due(self) -> bool:
        """At step 0, at every interval and at the end, unless its result was already written before a restart."""
        if self.step and self._pending is None:
            return False
        return self._is_evaluated_here()

    def _is_evaluated_here(self) -> bool:
        return self.step in (0, self._num_steps) or self.step % self._eval_every_steps == 0

    def _lacks_evaluation(self, record: dict[str, Any]) -> bool:
        return self._is_evaluated_here() and "loss_by_language" not in record

    def evaluate(self, eval_step, params, batches) -> None:
        """Puts held-out loss and bits per byte, and the epochs so far, into the record of this step."""
        self._complete()
        record = self._pending or self._record()
        started = time.monotonic()
        record |= held_out_losses(eval_step, params, batches)
        record |= language_report.at_evaluation(
            record["loss_by_language"], self._data.mixture, self._data.sources, record["samples"]
        )
        self._clock += time.monotonic() - started
        self._pending = record

    def stop(self, signal_name: str) -> int:
        """After the save: leaves the files whole and says how to go on."""
        self._flush()
        self._checkpoints.wait()
        self._journal.write("stop", step=self.step, samples=self.samples, signal=signal_name)
        if self._is_main:
            saved = "saved" if self.step else "nothing to save yet"
            print(
                f"stopped by {signal_name} after step {self.step}, {saved}; the same command goes on"
            )
        return EXIT_RESTART

    def finish(self, state: TrainState, vocabulary: Vocabulary, prompts: Sequence[str]) -> None:
        """Loss by language before and after, a sample of text, where the checkpoint is."""
        self._flush()
        self._checkpoints.wait()
        self._journal.write("done", step=self.step, samples=self.samples)
        length = self._data.sequence_length
        samples = sample_texts(self._model, state.params, vocabulary, prompts, length)
        if not self._is_main:
            return
        print_losses(self._metrics)
        if samples:
            print("samples (temperature 0.8, top-p 0.9):")
        for prompt, text in zip(prompts, samples, strict=True):
            print(f"  {prompt}|{' '.join(text.split())}")
        print(f"checkpoint: {self.model_dir / 'checkpoints' / str(self.step)}")
        if self._was_done:
            print(
                f"all {self.step} steps are done; to go further raise TRAIN_STEPS, for example "
                f"--gin.TRAIN_STEPS={2 * self.step}"
            )


def held_out_losses(
    eval_step: Callable[..., Any], params: Any, batches: Iterable[tuple[list[str], Batch]]
) -> dict[str, Any]:
    """`loss_by_language` and `validation_loss` (the mean over all windows) in nats a token, of EvalData's batches."""
    losses: dict[str, list[float]] = {}
    for languages, batch in batches:
        row_losses = np.asarray(eval_step(params, batch))
        for language, loss in zip(languages, row_losses[: len(languages)], strict=True):
            losses.setdefault(language, []).append(float(loss))
    return {
        "loss_by_language": {name: float(np.mean(x)) for name, x in sorted(losses.items())},
        "validation_loss": float(np.mean([x for part in losses.values() for x in part])),
    }


def print_losses(metrics: MetricsFile) -> None:
    """Held-out loss by language, first and last, in columns."""
    found = metrics.first_and_last_with("loss_by_language")
    if not found:
        return
    first, last = found
    before, after = first["loss_by_language"], last["loss_by_language"]
    print(f"held-out loss in nats a token, step {first['step']} -> step {last['step']}:")
    cells = [
        f"{name:<16}{before.get(name, float('nan')):6.2f} -> {after[name]:5.2f}" for name in after
    ]
    print_columns(cells)
    then, now = first["validation_loss"], last["validation_loss"]
    print(f"all languages: {then:.3f} -> {now:.3f} ({1 - now / then:.0%} lower)")
    bits = [record.get("validation_bits_per_byte") for record in found]
    if None not in bits:  # records of earlier versions have none
        print(f"bits per byte, mean over languages: {bits[0]:.3f} -> {bits[1]:.3f}")


def print_columns(cells: Sequence[str]) -> None:
    """Three columns, read downwards."""
    rows = -(-len(cells) // 3)
    for row in range(rows):
        print("   ".join(cells[row::rows]))


def sample_texts(
    model: Bloom, params: Any, vocabulary: Vocabulary, prompts: Sequence[str], max_length: int
) -> list[str]:
    """A continuation of each prompt; every host takes part, the parameters may be spread over all."""
    if not prompts:
        return []
    encoded = [vocabulary.encode(prompt) for prompt in prompts]
    num_new = max(1, max_length - max(map(len, encoded)))
    texts = decoding.generate(
        model,
        params,
        encoded,
        max_new_tokens=num_new,
        eos_id=vocabulary.eos_id,
        temperature=0.8,
        top_p=0.9,
    )
    return [vocabulary.decode(text) for text in texts]


def _spread(num_processes: int) -> str:
    return f" in {num_processes} processes" if num_processes > 1 else ""


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
