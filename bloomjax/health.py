"""What can end a run from outside: stop signals."""

import signal
import types

from bloomjax import job


class StopSignals:
    """Remembers SIGTERM, SIGUSR1 and SIGINT until the loop asks; a second SIGINT interrupts at once.

    Attributes:
      received: the signal that this process got.
      stopped_by: the one for which all processes stop, once `is_stop_due` has said so.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopped_by: str | None = None
        self._is_requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def is_stop_due(self, step: int) -> bool:
        """Whether the run stops after this step, the same on all processes; asked after every step."""
        if not job.is_shared():
            self.stopped_by = self.received
        else:
            if self.received and not self._is_requested:
                self._is_requested = True
                job.request_stop(self.received)
            self.stopped_by = job.stopped_by(step)
        return self.stopped_by is not None

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
