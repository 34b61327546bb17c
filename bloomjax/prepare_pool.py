"""Tasks for several processes: `run(function, tasks, num_workers, report)`.

Not concurrent.futures, whose workers wait for ever where their parent was killed, and finish what
they have begun where it was interrupted. Here they die with it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

from bloomjax.errors import BadInput

Task = TypeVar("Task")
Report = Callable[[int, int, int], None]
_SECONDS_BETWEEN_REPORTS = 0.2


def run(
    function: Callable[[Any, Report], Any],
    tasks: Sequence[Task],
    num_workers: int,
    report: Callable[[Task, int, int, int], None],
) -> Generator[tuple[Task, Any], None, None]:
    """Calls `function(task, report)` for every task and yields tasks with results, as they come.

    Args:
      function: and the tasks and results: things that can be pickled.
      tasks: the first ones are begun first.
      num_workers: number of processes; with 1 it is this one.
      report: what `function` reports, with the task in front.

    Raises:
      BadInput: of the function, as it is; or a worker was killed, with what it worked on.
      RuntimeError: of another error in a worker, with its traceback.
    """
    if num_workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, function(task, lambda *numbers, task=task: report(task, *numbers))
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit TensorFlow's threads
    workers: dict[Any, tuple[Any, Task]] = {}
    waiting = list(reversed(tasks))
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function), daemon=True)
            with _without_interrupts():
                process.start()
            theirs.close()  # else its end would not be noticed
            workers[ours] = process, waiting.pop()
            _send(ours, workers[ours][1])
        while workers:
            for pipe in connection.wait(list(workers)):
                assert isinstance(pipe, connection.Connection)
                process, task = workers[pipe]
                kind, content = _receive(pipe, process, task)
                if kind == "report":
                    report(task, *content)
                    continue
                if waiting:
                    workers[pipe] = process, waiting.pop()
                    _send(pipe, workers[pipe][1])
                else:
                    pipe.close()  # which ends it
                    del workers[pipe]
                    process.join()
                yield task, content
    finally:
        for process, _ in workers.values():
            process.kill()
        for pipe, (process, _) in workers.items():
            process.join()
            pipe.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal: this one ends the others, which begin with it blocked, for they would
    print a traceback each if it came before they could ask for that themselves. Here it waits for the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers are not its business
        yield
        return
    resource_tracker.ensure_running()  # starting it would take the block away
    came: list[int] = []
    # The mask is for the child; this process has other threads, which may take the signal.
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _send(pipe: connection.Connection, task: Any) -> None:
    with contextlib.suppress(ConnectionError):  # a worker that died: the next `_receive` says so
        pipe.send(task)


def _receive(pipe: connection.Connection, process: Any, task: Any) -> tuple[str, Any]:
    """The next message of a worker, a report or a result."""
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = "; too little memory?" if code == -signal.SIGKILL else ""
        name = getattr(task, "name", task)
        raise BadInput(
            f"a worker process was ended {how} while it worked on {name}{hint}; "
            f"what was finished is kept: run the same command again"
        ) from None
    if kind == "bad_input":
        raise BadInput(content)
    if kind == "error":
        raise RuntimeError(f"in a worker process:\n{content}")
    return kind, content


def _work(pipe: connection.Connection, function: Callable[[Any, Report], Any]) -> None:
    """A worker: tasks come through the pipe, reports and results go back, until the parent closes it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task = pipe.recv()
            reporter = _Reporter(pipe)
            try:
                message = ("result", function(task, reporter))
            except BadInput as error:
                message = ("bad_input", str(error))
            except Exception:
                message = ("error", traceback.format_exc())
            reporter.flush()
            pipe.send(message)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Reporter:
    """Adds reports up and sends them from time to time."""

    def __init__(self, pipe: connection.Connection):
        self._pipe = pipe
        self._sums = [0, 0, 0]
        self._last_seconds = time.monotonic()

    def __call__(self, *numbers: int) -> None:
        self._sums = [a + b for a, b in zip(self._sums, numbers, strict=True)]
        if time.monotonic() - self._last_seconds >= _SECONDS_BETWEEN_REPORTS:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(("report", self._sums))
        self._sums = [0, 0, 0]
        self._last_seconds = time.monotonic()
