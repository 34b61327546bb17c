"""What a run writes down of its steps: metrics.jsonl, event files, and the progress a person watches."""

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.journal import LineFile


class ScalarWriter(Protocol):
    """The part of clu.metric_writers.MetricWriter that a run needs; clu's own writers fit (they load TensorFlow)."""

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...
    def write_texts(self, step: int, texts: dict[str, str]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class EventFileWriter:
    """TensorBoard event files through tensorboardX, without TensorFlow, behind clu's writer interface."""

    def __init__(self, logdir: str, first_step: int):
        """What the folder already has of `first_step` and later steps is hidden: a restart does them again."""
        # tensorboardX imports torch where it is installed, which takes seconds and is of no use here.
        sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
        try:
            from tensorboardX import SummaryWriter
        finally:
            if sys.modules["torch"] is None:
                del sys.modules["torch"]
        self._writer = SummaryWriter(logdir, purge_step=first_step)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def clu_writer(logdir: str, first_step: int) -> ScalarWriter:
    """clu's default writer (event files and the log). Loads TensorFlow: only for those who bind it in gin."""
    try:
        from clu import metric_writers
    except ImportError as error:
        raise BadInput(f"clu_writer needs TensorFlow and tensorboard: {error}") from error

    del first_step
    return metric_writers.create_default_writer(logdir)


class MetricsFile:
    """metrics.jsonl holds each step once: what a resume supersedes moves to metrics.superseded.jsonl."""

    def __init__(self, model_dir: Path, enabled: bool = True):
        self._path = model_dir / "metrics.jsonl"
        self._superseded = model_dir / "metrics.superseded.jsonl"
        self._lines = LineFile(self._path)
        self._enabled = enabled

    def resume_after(self, step: int) -> None:
        """Cuts lines of steps after `step`, and a line that a crash left unfinished."""
        if not self._enabled or not self._path.exists():
            return
        kept, cut = [], []
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                is_kept = line.endswith(b"\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                is_kept = False
            (kept if is_kept else cut).append(line if line.endswith(b"\n") else line + b"\n")
        if not cut:
            return
        with self._superseded.open("ab") as file:
            file.writelines(cut)
        write_whole(self._path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        if self._enabled:
            self._lines.append(record)

    def last(self) -> dict[str, Any] | None:
        """The newest record."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        return json.loads(lines[-1]) if lines else None

    def first_and_last_with(self, key: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The first and the last record that has `key`."""
        if not self._path.exists():
            return None
        lines = self._path.read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if key in record]
        return (records[0], records[-1]) if records else None


class Progress:
    """One line on a terminal that rewrites itself; in a log, one line every `log_seconds`."""

    def __init__(self, first_step: int, num_steps: int, log_seconds: float = 15.0):
        from tqdm import tqdm

        self._tty = sys.stderr.isatty()
        self._log_seconds = log_seconds
        self._last_log = 0.0
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True,
            disable=not self._tty, smoothing=0.05,
        )  # fmt: skip
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # step and time of the first update

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        if self._tty:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False
            )
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = step, now  # what came before was compilation
        if now - self._last_log >= self._log_seconds or step == self._num_steps:
            self._last_log = now
            line = f"step {step}/{self._num_steps}  loss {loss:.4f}"
            first_step, first_time = self._first
            if step > first_step:
                rate = (now - first_time) / (step - first_step)
                eta = int(rate * (self._num_steps - step))
                line += f"  {tokens_per_second:,.0f} tokens/s"
                line += f"  ETA {eta // 3600}:{eta % 3600 // 60:02d}:{eta % 60:02d}"
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()


def lock_model_dir(model_dir: str | Path) -> TextIO:
    """Makes MODEL_DIR and locks it until the returned file is closed or the process ends.

    BadInput if it is a URL or a file, cannot be written, or another process trains there (its host and pid are named).
    """
    if "://" in str(model_dir):
        raise BadInput(f"MODEL_DIR {model_dir} must be a folder; URLs are not supported yet")
    model_dir = Path(model_dir)
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        file = (model_dir / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"MODEL_DIR {model_dir} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BadInput(f"{holder} trains in MODEL_DIR {model_dir} at this moment") from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file
