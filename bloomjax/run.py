"""What `train` does around its steps: restore, save, evaluate, write down, react to what went wrong."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import bloomjax
from bloomjax import flops, job, language_report, screen
from bloomjax.checkpoints import Checkpoints, is_imported
from bloomjax.data import OpenTrainData
from bloomjax.errors import EXIT_RESTART, BadInput, Restart
from bloomjax.files import write_whole
from bloomjax.guard import RollBack, Verdict
from bloomjax.health import Health
from bloomjax.journal import Journal, read_lines
from bloomjax.language_noise import OpenLanguageNoise
from bloomjax.ledger import Ledger
from bloomjax.metrics import MetricsFile, Progress, ScalarWriter, lock_model_dir
from bloomjax.model import Bloom
from bloomjax.noise_scale import NoiseRecorder
from bloomjax.position import Position
from bloomjax.reweighting import Reweighting
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.train_state import TrainState
from bloomjax.train_step import Batch
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
        health: Health,
        writer: Callable[[str, int], ScalarWriter] | None,
        config_text: str,
        language_noise: OpenLanguageNoise | None = None,
        reweighting: Reweighting | None = None,
    ):
        self.model_dir = Path(model_dir)
        self.mesh = mesh
        self._num_steps = num_steps
        self._eval_every_steps = eval_every_steps
        self._batch_schedule = batch_schedule
        self._learning_rate = learning_rate
        self._model = model
        self._data = data
        self._checkpoints = checkpoints
        self._health = health
        self._language_noise = language_noise
        self._noise = NoiseRecorder()
        self._reweighting = reweighting
        self._is_main = job.is_main()
        self._pending: dict[str, Any] | None = None  # record of the newest step
        self._make_writer = writer
        self._config_text = config_text
        self._writer: ScalarWriter | None = None
        self._flops_per_token = self._flops_per_token_of(data.sequence_length)
        self._num_devices = mesh.devices.size
        self._device_kind = mesh.devices.flat[0].device_kind
        self._origin = "starts"
        self._was_done = False
        self._progress: Progress | None = None  # on the main process, while there are steps to do
        self._compiled: set[tuple[Any, ...]] = set()  # shapes of batches
        self._is_save_called = False
        self._is_save_owed = False  # not made because the newest step was refused
        self._restored_step, self._num_bad_starts = -1, 0
        self._last_record: dict[str, Any] | None = None  # that was written
        self._verified_step = 0  # the newest after which all copies were equal
        if eval_every_steps < 1:
            raise BadInput(f"eval_every_steps must be at least 1, got {eval_every_steps}")
        self._stack = contextlib.ExitStack()
        if self._is_main:
            self._stack.enter_context(lock_model_dir(model_dir))
        self._ledger = Ledger(self.model_dir, self._is_main)
        self._metrics = MetricsFile(self.model_dir, self._is_main)
        self._journal = Journal(self.model_dir, self._is_main)
        self._restart_clocks()

    def __enter__(self) -> "Run":
        health = self._health
        if health.watchdog:
            health.watchdog.start(self._journal)
            self._stack.callback(health.watchdog.stop)
        self._setup = self._stack.enter_context(contextlib.ExitStack())
        self._setup.enter_context(health.setup("restore"))
        try:
            self.position = Position(self.model_dir, self._model, self._data, self._batch_schedule)
            if health.fault:
                health.fault.open(self._journal)
            if health.energy:
                health.energy.open(self.mesh.local_devices, self._num_devices, self._journal)
                self._stack.callback(health.energy.close)
        except BaseException as error:
            self._ledger.close(None, type(error).__name__)
            self._stack.close()
            raise
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        """Whatever ends the run, a checkpoint that is being written gets finished, and the folder is free again."""
        del kind, trace
        reason = type(error).__name__ if error else self._health.stops.stopped_by or "done"
        if error is not None and job.is_lost_peer(error):
            self._journal.write_from_here("lost_peer", reason=job.one_line(error))
            self._ledger.close(EXIT_RESTART, "lost_peer")
            return  # no save is finished without it, and the process ends at once
        try:
            with self._health.setup("save"):
                self._checkpoints.close()
            if self._writer:
                self._writer.close()
            if self._progress:
                self._progress.close()
        finally:
            if error is not None:
                self._book_energy(0.0)
            self._ledger.close(None, reason)
            self._stack.close()

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.position.step

    # ---- restore ----

    def restore(
        self, abstract: TrainState, from_params: Callable[[Any], TrainState]
    ) -> TrainState | None:
        """The state to go on from; None to start anew. `from_params` makes one of imported parameters.

        Also after a roll back, when the checkpoints after it are put aside.
        """
        self._ledger.enter("restore")
        if self._checkpoints.directory is None:
            self._checkpoints.open(self.model_dir / "checkpoints")
            if self._health.replicas:
                self._health.replicas.prepare(abstract)
        restored = self._checkpoints.restore(abstract, self.position.check, from_params)
        for problem in self._checkpoints.problems:
            self._journal.write("damaged_checkpoint", problem=problem)
        self._note_incidents()
        self._pending = None
        self._is_save_called = self._is_save_owed = False
        self._verified_step = 0
        if restored is None:
            self._restored_step = -1
            self.position.reset()
            self._restore_parts({})
            self._metrics.resume_after(-1)
            return None
        state, position = restored
        self._restored_step = self.step
        self._restore_parts(position)
        if is_imported(position):
            self._origin = f"starts from {position['imported']['source']}"
            self._metrics.resume_after(-1)
            return state
        self._metrics.resume_after(self.step)
        last = job.on_main(self._metrics.last)
        if not last or last["step"] < self.step or self._lacks_evaluation(last):
            # The process died between saving this step and writing its record.
            self._metrics.resume_after(self.step - 1)
            self._pending = position["record"]
        self._was_done = self.is_done()
        self._verified_step = self.step
        return state

    def _restore_parts(self, position: dict[str, Any]) -> None:
        if self._health.guard:
            self._health.guard.restore(position.get("guard"))
        weights = position.get("reweighting")
        if (weights is None) != (self._reweighting is None) and self.step:
            was, now = ("with", "without") if weights else ("without", "with")
            raise BadInput(
                f"MODEL_DIR {self.model_dir} holds a run {was} train.reweighting, this configuration is one {now} it; "
                "take another MODEL_DIR"
            )
        if self._reweighting:
            self._reweighting.restore(weights)

    def roll_back(self, back: RollBack) -> None:
        """Deletes the samples of some steps, and puts aside the checkpoints that were trained on them.

        BadInput if there are checkpoints, but none before these steps: then nothing is touched.
        """
        with self._ledger.during("restore"), self._health.setup("restore"):
            self._checkpoints.settle()
            steps = job.on_main(self._checkpoints.steps)
            if steps and min(steps) >= back.first_step:
                raise BadInput(
                    f"step {back.step} asks to go back to before step {back.first_step}, but the checkpoints of "
                    f"{self.model_dir} are of steps {', '.join(map(str, steps))}; nothing was touched: keep more "
                    "(Checkpoints.keep_last), or take a smaller SpikeGuard.rollback_steps or another policy"
                )
            if steps:  # of process 0: the save that has just ended may be the one to go back to
                self._checkpoints.pin(
                    max(step for step in steps if step < back.first_step),
                    f"roll back at step {back.step}",
                )
            self._checkpoints.put_aside_from(back.first_step)
            samples = self.position.delete(back.first_step, back.step)
        self._note_incidents()
        self._journal.write("rollback", step=back.step, first_step=back.first_step, samples=samples)
        if self._writer:
            self._writer.close()
        if self._progress:
            self._progress.close()
        self._setup.enter_context(self._health.setup("restore"))

    def announce(self, state: TrainState, filled: Sequence[str]) -> None:
        """The parameter table, what a step is, and from where the run goes on."""
        here = {
            "host": os.uname().nodename, "pid": os.getpid(), "devices": [d.id for d in jax.local_devices()]
        }  # fmt: skip
        processes = job.gather(here)
        samples = self.position.samples
        self._journal.write(
            "start", step=self.step, samples=samples, num_steps=self._num_steps, pid=here["pid"],
            host=here["host"], device=self._device_kind, num_devices=self._num_devices,
            jax=jax.__version__, bloomjax=bloomjax.__version__, processes=processes,
        )  # fmt: skip
        num_tokens = self._data.kept.tokens_after(
            self._batch_schedule.samples_after(self._num_steps)
        )
        self._ledger.note_plan(num_steps=self._num_steps, step=self.step, num_tokens=num_tokens)
        if self._health.energy:
            self._health.energy.num_hosts = len({each["host"] for each in processes})
        if self._is_main:
            records = read_lines(self.model_dir / "metrics.jsonl")[0]
            self._noise.begin([*records, self._pending or {}])
        if self._is_main and self._health.predicted_loss:
            predicted = self._health.predicted_loss
            predicted.begin(
                model_dir=self.model_dir, journal=self._journal,
                params=predicted.params_of(self._model.config.shape), end_tokens=num_tokens,
                schedule_tokens=self._data.kept.tokens_after(self._learning_rate.decay_samples),
                sequence_length=self._data.sequence_length,
            )  # fmt: skip
        if self._is_main:
            if self._config_text.strip():  # empty when no gin file was read
                write_whole(self.model_dir / "config.gin", self._config_text.encode())
            if self._make_writer:
                self._writer = self._make_writer(str(self.model_dir), self.step + 1)
                self._writer.write_texts(self.step, {"config": self._config_text})
        self._setup.close()
        self._restart_clocks()
        if self.is_done() or not self._is_main:
            return
        if self.step == 0:
            screen.print_parameters(state.params)
        size = self._batch_schedule.batch_size(self.step + 1)
        screen.print_step_size(
            self._num_devices, self._device_kind, len(processes), size, self._tokens_of(samples, size),
            self._flops_per_token,
        )  # fmt: skip
        for line in filled:
            print(line)
        start = f"goes on after step {self.step}" if self.step else self._origin
        print(f"{self.model_dir}: {start}, {self._num_steps} steps in all", flush=True)
        self._progress = Progress(self.step, self._num_steps)

    # ---- steps ----

    def begin_step(self, batch: Batch, state: TrainState) -> Batch:
        """Before the next step is dispatched: the weights of its rows, and faults on purpose."""
        if self._reweighting:
            batch = self._reweigh(self._reweighting, batch, state.params)
        fault = self._health.fault
        if fault is None:
            return batch
        fault.before_step(self.step + 1)
        return fault.on_batch(batch, self._data.samples_of(self.step + 1, self._batch_schedule))

    def _reweigh(self, reweighting: Reweighting, batch: Batch, params: Any) -> Batch:
        self._complete()  # which undoes the weights of a step that was refused
        host_seconds = time.monotonic() - self._host_clock
        samples = self._data.samples_of(self.step + 1, self._batch_schedule)
        with self.dispatching(batch, "reweigh"):
            batch = reweighting.reweigh(batch, params, self._data.mixture.locate(samples)[0])
        self._host_clock = time.monotonic() - host_seconds  # it has waited for the device
        return batch

    @contextlib.contextmanager
    def dispatching(self, batch: Batch, program: str = "step") -> Iterator[None]:
        """Around the dispatch of a step, which compiles a program for the first batch of each shape."""
        shape = (program, *batch["tokens"].shape)
        if shape in self._compiled:
            self._ledger.enter("step")
            yield
            return
        self._complete()  # the step before has nothing to do with it
        started = time.monotonic()
        self._ledger.enter("compile")
        with self._health.setup("compile"):
            yield
        self._compiled.add(shape)
        self._ledger.enter("step")
        self._skip_clocks(started)

    def next_learning_rate(self) -> np.float32:
        """Of the step to come: that of the samples consumed before it."""
        return np.float32(self._learning_rate(self.position.samples))

    def next_limits(self) -> np.ndarray | None:
        """Of loss and gradient norm of the step to come; None without a guard."""
        return self._limits(self.step + 1)

    def _limits(self, step: int) -> np.ndarray | None:
        if self._health.guard is None:
            return None
        # Another phase is another loss: what was before says nothing.
        first_step = self._data.first_step_like(step, self._batch_schedule)
        return self._health.guard.limits(step, first_step)

    def finish_step(self, state: TrainState, metrics: dict[str, jax.Array]) -> TrainState:
        """Counts the step just dispatched, whose state is returned, and writes the record of the one before.

        Raises RollBack, BadInput or Restart for what was wrong with a step.
        """
        if self._health.stragglers:
            self._health.stragglers.host_step(time.monotonic() - self._host_clock)
        self._flush()
        self._host_clock = time.monotonic()
        self.position.advance()
        size = self._batch_schedule.batch_size(self.step)
        entries = self._noise_of_a_language(state.params)
        if self._reweighting:
            entries |= self._reweighting.record(self.step)
            metrics = {
                k: v for k, v in metrics.items() if not k.startswith("part_")
            }  # of rows that weigh alike
        self._pending = self._record() | {"batch_size": size, **metrics, **entries}
        if self._health.fault:
            state = self._health.fault.on_state(self.step, state)
        if self._health.replicas and self._health.replicas.is_due(self.step):
            self._check_replicas(state)
        self._note_stragglers()
        return state

    def _noise_of_a_language(self, params: Any) -> dict[str, Any]:
        meter = self._language_noise
        due = meter.batch_of(self.step) if meter else None
        if meter is None or due is None:
            return {}
        entries, batch = due
        with self.dispatching(batch, "noise"):
            return entries | meter.program(params, batch)

    def _record(self) -> dict[str, Any]:
        samples = self.position.samples
        return {
            "step": self.step,
            "samples": samples,
            "tokens": self._data.kept.tokens_after(samples),
            "learning_rate": self._learning_rate(samples),
        }

    def _complete(self) -> None:
        """Waits for the newest step and puts its numbers into its record."""
        record = self._pending
        if record is None or "seconds" in record or "loss" not in record:
            return
        loss, grad_norm = float(record["loss"]), float(record["grad_norm"])
        is_taken = bool(record.pop("is_taken", True))
        self._health.beat(record["step"])
        self._ledger.finished_step(record["step"])
        record |= {"loss": loss, "grad_norm": grad_norm}
        self._noise.note(record)
        self._judge(record, is_taken)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        num_tokens = self._tokens_of(record["samples"] - record["batch_size"], record["batch_size"])
        rate = num_tokens / seconds
        peak = flops.peak_flops_per_second(self._device_kind)
        flops_per_token = self._flops_per_token_of(num_tokens / record["batch_size"]).causal
        mfu = flops.mfu(rate * flops_per_token, 1.0, self._num_devices, peak)
        record |= {
            "tokens_per_second": round(rate, 1),
            "mfu": round(mfu, 4) if mfu else None,
            "seconds": round(seconds, 4),
        }
        if self._progress:
            self._progress.update(record["step"], loss, rate)

    def _flush(self) -> None:
        self._complete()
        record, self._pending = self._pending, None
        if record is None:
            return
        if self._health.predicted_loss:
            record |= self._health.predicted_loss.note(record)
        self._metrics.write(record)
        self._last_record = record
        if self._writer:
            scalars = {
                k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"
            }
            for key in [key for key in record if key.endswith("_by_language")]:
                scalars |= {f"{key}/{name}": x for name, x in record[key].items()}
            self._writer.write_scalars(record["step"], scalars)
            if "epochs_by_language" in record:
                shares = language_report.declared_shares(self._data.kept, record["samples"])
                table = language_report.markdown_table(record, shares)
                self._writer.write_texts(record["step"], {"languages": table})

    # ---- what went wrong ----

    def _judge(self, record: dict[str, Any], is_taken: bool) -> None:
        """Whether the step of this record is as it should be; before anything of it is saved."""
        step, loss, grad_norm = record["step"], record["loss"], record["grad_norm"]
        guard = self._health.guard
        if guard:
            verdict = guard.judge(step, loss, grad_norm, is_taken)
            if guard.num_refused:
                record["refused_steps"] = guard.num_refused
        else:
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            verdict = None if is_finite else Verdict("not_finite", "stop", 1)
        if verdict is None:
            return
        if self._reweighting:
            self._reweighting.undo()
        numbers = {
            name: x if math.isfinite(x) else str(x)
            for name, x in (("loss", loss), ("grad_norm", grad_norm))
        }
        first, num = record["samples"] - record["batch_size"], record["batch_size"]
        self._journal.write(
            verdict.cause, step=step, action=verdict.action, in_a_row=verdict.in_a_row,
            samples=[[s, s + n] for s, n in self._data.kept.skips.runs(first, num)],
            languages=self._data.kept.sources(first, num), **numbers,
            limits=None if (limits := self._limits(step)) is None else limits.tolist(),
        )  # fmt: skip
        # JSON has no NaN, and a record that is not finite would be the last line of every plot.
        record |= {name: None for name in ("loss", "grad_norm") if not math.isfinite(record[name])}
        first_step = self._first_step_to_undo(step) if verdict.action == "rollback" else step
        before = self._checkpoints.last_before(first_step)
        if (
            before is not None and verdict.in_a_row == 1
        ):  # later ones may hold what made the step bad
            self._checkpoints.pin(before, f"{verdict.cause} at step {step}")
        samples = self._data.kept.samples(first, num)
        what = f"step {step} (samples {samples[0]} to {samples[-1]}) has loss {loss} and gradient norm {grad_norm}"
        if verdict.action == "skip":
            self._warn(f"{what}; it was not taken (journal.jsonl)")
            return
        self._pending = None
        if verdict.action == "rollback":
            self._warn(f"{what}; going back to before step {first_step}, without these samples")
            raise RollBack(first_step, step)
        again = f", {verdict.in_a_row} refused in a row" if verdict.in_a_row > 1 else ""
        raise BadInput(f"{what}{again}; stopped, nothing of it is saved in {self.model_dir}")

    def _first_step_to_undo(self, step: int) -> int:
        """When the first step after a checkpoint is refused again with other samples, the checkpoint is to blame."""
        assert self._health.guard is not None
        is_first = step == self._restored_step + 1
        self._num_bad_starts = self._num_bad_starts + 1 if is_first else 0
        first_step = max(1, step - self._health.guard.rollback_steps + 1)
        return max(1, step - 1) if self._num_bad_starts > 1 else first_step

    def _check_replicas(self, state: TrainState) -> None:
        """Restart if copies differ: nothing of them may be saved, and the last checkpoint was made when none did."""
        replicas = self._health.replicas
        if replicas is None or self._verified_step == self.step:
            return
        found = replicas.differences(state)
        if not found:
            self._verified_step = self.step
            return
        self._journal.write(
            "drift", step=self.step, verified_step=self._verified_step, differences=found
        )
        first = found[0]
        raise Restart(
            f"after step {self.step} device {first['device']} of {first['host']} holds another {first['leaf']} than "
            f"its copies ({len(found)} such); nothing of it is saved, a restart goes back to the last checkpoint"
        )

    def _note_stragglers(self) -> None:
        report = self._health.stragglers.report(self.step) if self._health.stragglers else None
        if report is None or self._pending is None:
            return
        host, seconds = max(report["host_seconds"].items(), key=lambda item: item[1])
        self._pending |= {"slowest_host": host, "slowest_host_seconds": seconds}
        if report["slow"]:
            self._journal.write("straggler", step=report["step"], slow=report["slow"])

    def _note_incidents(self) -> None:
        incidents = self._checkpoints.incidents
        while incidents:
            self._journal.write(**incidents.pop(0))

    def _warn(self, line: str) -> None:
        if self._is_main:
            print(f"bloomjax: {line}", file=sys.stderr, flush=True)

    # ---- save, evaluate, end ----

    def is_stop_due(self) -> bool:
        """Whether all processes stop after this step; asked once after every step."""
        return self._health.stops.is_stop_due()

    def is_save_due(self) -> bool:
        """By steps, by minutes, at the end, and again after one that failed; the same on all processes."""
        minutes = self._checkpoints.save_every_minutes
        is_late = minutes is not None and time.monotonic() - self._save_clock >= 60 * minutes
        wants = (is_late and self._is_main) or self._checkpoints.wants_retry()
        if job.is_shared():
            if wants and not self._is_save_called:
                self._is_save_called = True
                job.request_save()
            wants = job.is_save_requested()
        return wants or self._is_save_owed or self.is_done() or self._checkpoints.is_due(self.step)

    def save(self, state: TrainState) -> None:
        """Begins to save the state after this step, unless it is saved.

        While steps are refused nothing is saved: it may be the state that is no good, and its copies would push out
        the last good one. The end of the run is saved in any case.
        """
        if self.step == 0:
            return
        self._complete()
        guard = self._health.guard
        self._is_save_owed = bool(guard and guard.in_a_row) and not self.is_done()
        if self._is_save_owed:
            return
        if self._health.replicas and self._verified_step < self.step:
            self._check_replicas(state)
        started = time.monotonic()
        record = self._pending or self._last_record  # of this step
        position = {"record": record, **self.position.fields()}
        if guard:
            position["guard"] = guard.state()
        if self._reweighting:
            position["reweighting"] = self._reweighting.state()
        with self._ledger.during("save"), self._health.setup("save"):
            if self._health.fault:
                self._health.fault.full_disk(self.step)
            is_begun = self._checkpoints.save(self.step, state, position)
        self._note_incidents()
        self._save_clock, self._is_save_called = time.monotonic(), False
        if is_begun:
            self.position.saved()
            if self._writer:
                self._writer.flush()
            stall = round(time.monotonic() - started, 3)
            self._journal.write(
                "save", step=self.step, samples=self.position.samples, stall_seconds=stall
            )
            self._book_energy(0.5)
            if self._health.fault:
                self._health.fault.in_save(self.step)
        self._skip_clocks(started)

    def is_done(self) -> bool:
        return self.step >= self._num_steps

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
        with self._ledger.during("evaluate"):
            record |= held_out_losses(self._watched(eval_step), params, batches)
        record |= language_report.at_evaluation(
            record["loss_by_language"], self._data.kept, self._data.sources, record["samples"],
            self._data.objective,
        )  # fmt: skip
        self._skip_clocks(started)
        self._pending = record

    def _watched(self, eval_step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """With a sign of life after each batch: BLOOM's evaluations hung for 18, 11 and 6 hours."""

        def watched(params, batch):
            is_new = ("evaluate", *batch["tokens"].shape) not in self._compiled
            with self._health.setup("compile") if is_new else contextlib.nullcontext():
                losses = np.asarray(eval_step(params, batch))
            self._compiled.add(("evaluate", *batch["tokens"].shape))
            self._health.beat()
            return losses

        return watched

    def stop(self, state: TrainState) -> int:
        """After the save: leaves the files whole and says how to go on. The exit code."""
        self._end(state)
        stops = self._health.stops
        reason = stops.stopped_by
        self._journal.write("stop", step=self.step, samples=self.position.samples, signal=reason)
        if self._is_main:
            saved = "saved" if self.step else "nothing to save yet"
            if self._is_save_owed:
                saved = f"not saved, because step {self.step} was refused"
            then = "the same command goes on"
            if stops.exit_code == 0:
                then = f"without {stops.kill_switch} {then}"
            print(f"stopped by {reason} after step {self.step}, {saved}; {then}")
        return stops.exit_code

    def finish(self, state: TrainState, vocabulary: Vocabulary, prompts: Sequence[str]) -> None:
        """Loss by language before and after, a sample of text, where the checkpoint is."""
        self._end(state)
        self._journal.write("done", step=self.step, samples=self.position.samples)
        length = self._data.sequence_length
        samples = screen.sample_texts(
            self._model, state.params, vocabulary, prompts, length,
            self._data.objective.sees_whole_prompt(),
        )  # fmt: skip
        if not self._is_main:
            return
        screen.print_losses(self._metrics)
        screen.print_samples(prompts, samples)
        place = self._checkpoints.directory  # to a local one MODEL_DIR has a link
        if "://" not in str(place):
            place = self.model_dir / "checkpoints"
        print(f"checkpoint: {place}/{self.step}")
        if self._was_done:
            print(
                f"all {self.step} steps are done; to go further raise TRAIN_STEPS, for example "
                f"--gin.TRAIN_STEPS={2 * self.step}"
            )

    def _end(self, state: TrainState) -> None:
        self._flush()
        self._ledger.enter("finish")
        self._setup.enter_context(self._health.setup("save"))
        try:
            self._checkpoints.wait(save_again=lambda: self.save(state))
        finally:
            self._note_incidents()
        self._book_energy(2.0)

    def _book_energy(self, wait_seconds: float) -> None:
        """Of all that was used since the last time; by all processes."""
        if self._health.energy:
            seconds, step_seconds = self._ledger.seconds()
            self._health.energy.book(self.step, seconds, step_seconds, wait_seconds=wait_seconds)

    # ---- clocks and counts ----

    def _restart_clocks(self) -> None:
        self._clock = self._host_clock = self._save_clock = time.monotonic()

    def _skip_clocks(self, started: float) -> None:
        """What was done since `started` is no part of a step."""
        gone = time.monotonic() - started
        self._clock += gone
        self._host_clock += gone

    def _tokens_of(self, first: int, num: int) -> int:
        """Tokens predicted in the samples at the positions [first, first + num)."""
        tokens_after = self._data.kept.tokens_after
        return tokens_after(first + num) - tokens_after(first)

    def _flops_per_token_of(self, sequence_length: float) -> flops.FlopCount:
        shape = self._model.config.shape
        return flops.flops_per_token(**shape, sequence_length_tokens=sequence_length)


def held_out_losses(
    eval_step: Callable[..., Any], params: Any, batches: Iterable[tuple[list[str], Batch]]
) -> dict[str, Any]:
    """`loss_by_language` and `validation_loss` of EvalData's batches, in nats: means over targets by their weights, not
    over windows, as the loss of a step is. BadInput names languages without a target."""
    sums: dict[str, np.ndarray] = {}  # of the loss, and of the weights
    for languages, batch in batches:
        rows = np.asarray(eval_step(params, batch), np.float64).T
        for language, row in zip(languages, rows[: len(languages)], strict=True):
            sums[language] = sums.get(language, np.zeros(2)) + row
    if without := [name for name, (_, weight) in sums.items() if not weight]:
        raise BadInput(f"no target in the held-out windows of: {', '.join(sorted(without))}")
    total, weight = sum(sums.values(), np.zeros(2))
    return {
        "loss_by_language": {name: float(x / w) for name, (x, w) in sorted(sums.items())},
        "validation_loss": float(total / weight),
    }
