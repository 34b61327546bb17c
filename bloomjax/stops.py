"""What ends a run from outside, after a save: signals, a kill-switch file, the end of its time."""

import os
import signal
import time
import types
from pathlib import Path

from bloomjax import job
from bloomjax.errors import EXIT_RESTART, BadInput
from bloomjax.ledger import process_age_seconds

KILL_SWITCH = "kill switch"
_LOOK_SECONDS = 2.0


class StopConditions:
    """Remembers what asked the run to stop, until the loop asks; SIGINT twice interrupts at once.

    Attributes:
      received: what this process heard of: a signal's name, "kill switch" or "exit_after_minutes".
      stopped_by: the one for which all processes stop, once `is_stop_due` has said so.
    """

    def __init__(self, *, kill_switch: str | None = None, exit_after_minutes: float | None = None):
        """
        Args:
          kill_switch: a file (by default `kill_switch` in MODEL_DIR); where it exists the run saves and ends with 0.
          exit_after_minutes: since the process began, after which the run saves and ends with 75; leave time to save.
        """
        if exit_after_minutes is not None and not exit_after_minutes > 0:
            raise BadInput(f"exit_after_minutes must be above 0 or None, got {exit_after_minutes}")
        self._kill_switch = kill_switch
        self._exit_after_minutes = exit_after_minutes
        self.received: str | None = None
        self.stopped_by: str | None = None
        self._is_requested = False
        self._next_look = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopConditions":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def exit_code(self) -> int:
        """0 for the kill switch, else that of a run which wants to go on."""
        return 0 if self.stopped_by == KILL_SWITCH else EXIT_RESTART

    def open(self, model_dir: Path) -> bool:
        """Whether the kill switch is there before the run begins. BadInput where its folder cannot be read."""
        is_strict = self._kill_switch is not None
        self._kill_switch = self._kill_switch or str(model_dir / "kill_switch")
        self._next_look = 0.0
        return job.on_main(lambda: self._is_killed(is_strict))

    @property
    def kill_switch(self) -> str | None:
        """The file; None before `open` where it is the default."""
        return self._kill_switch

    def is_stop_due(self) -> bool:
        """Whether the run stops now, the same on all processes; asked once after every step."""
        self.received = self.received or self._look()
        if not job.is_shared():
            self.stopped_by = self.received
        else:
            if self.received and not self._is_requested:
                self._is_requested = True
                job.request_stop(self.received)
            self.stopped_by = job.stopped_by()
        return self.stopped_by is not None

    def _look(self) -> str | None:
        """At file and clock, on the process that speaks for all, every two seconds."""
        now = time.monotonic()
        if not job.is_main() or now < self._next_look:
            return None
        self._next_look = now + _LOOK_SECONDS
        if self._is_killed():
            return KILL_SWITCH
        minutes = self._exit_after_minutes
        if minutes is not None and process_age_seconds() >= 60 * minutes:
            return "exit_after_minutes"
        return None

    def _is_killed(self, is_strict: bool = False) -> bool:
        if self._kill_switch is None:
            return False
        try:
            os.stat(self._kill_switch)
        except FileNotFoundError:
            return False
        except OSError as error:  # of a file system that stumbles, later on: no reason to end
            if is_strict:
                raise BadInput(
                    f"kill_switch {self._kill_switch} cannot be looked for: {error.strerror}"
                ) from error
            return False
        return True

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
