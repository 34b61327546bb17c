"""Joules of a run, booked in journal.jsonl: measured by NVML where it is, else power from a table x measured duty.

An entry is what was used since the one before, of all processes together:

    {"event": "energy", "step": 200, "seconds": 3610.2, "step_seconds": 3502.9, "device": "NVIDIA H100 80GB HBM3",
     "num_devices": 16, "num_hosts": 2, "measured_devices": 16, "measured_joules": 3.1e7, "estimated_joules": 0.0,
     "source": "nvml", "kwh_so_far": 17.31, "co2_grams_per_kwh": 57.0, "pue": 1.0}

Entries are written with each save, and when the run ends; a killed start loses what came after its last entry, and
nothing is there twice. `estimated_joules` is null where no power is known.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bloomjax import energy, job
from bloomjax.errors import BadInput
from bloomjax.journal import Journal

EVENT = "energy"
_SAMPLE_SECONDS = 1.0


class _Total(NamedTuple):
    """Of one start so far."""

    seconds: float
    step_seconds: float
    measured: float  # joules
    estimated: float


class Energy:
    """Books the energy of a run.

    Each process reads its own devices; process 0 adds up what all have read, and writes. It waits for the readings of
    the others for a moment only: they count from the start of a process, so what is late is in the next entry.

    Args:
      region, co2_grams_per_kwh: of the electricity: a name of `energy.REGIONS`, or the number itself.
      pue: of the site.
      device_watts, idle_device_watts: of one device while it trains and while it waits, in place of the table's, where
        NVML does not measure; of a CPU only this is known.
      use_nvml: measure where pynvml (nvidia-ml-py) is installed.
    """

    def __init__(
        self,
        *,
        region: str = "france",
        co2_grams_per_kwh: float | None = None,
        pue: float = 1.0,
        device_watts: float | None = None,
        idle_device_watts: float | None = None,
        use_nvml: bool = True,
    ):
        grams = energy.grams_of(region) if co2_grams_per_kwh is None else co2_grams_per_kwh
        self.site = energy.Site(grams, pue)
        self._given = None
        if device_watts is not None:
            self._given = energy.given_power(device_watts, idle_device_watts)
        elif idle_device_watts is not None:
            raise BadInput("Energy.idle_device_watts needs Energy.device_watts")
        self._use_nvml = use_nvml
        self.num_hosts = 1
        self._meter: NvmlMeter | None = None

    def open(self, local_devices: Sequence[Any], num_devices: int, journal: Journal) -> None:
        """Begins to measure. local_devices: this process's of the `num_devices` of the mesh (jax.Device)."""
        self._kind = local_devices[0].device_kind if local_devices else "none"
        self._num_devices, self._num_local = num_devices, len(local_devices)
        self._power = self._given or energy.power_of(self._kind)
        self._journal = journal
        self._meter = open_nvml(local_devices) if self._use_nvml else None
        self._readings: dict[int, dict[str, Any]] = {}  # newest of each process
        self._num_published = self._num_forgotten = 0
        self._booked = _Total(0.0, 0.0, 0.0, 0.0)
        self._kwh_before = kwh_of(journal.events(EVENT)) if job.is_main() else None

    def close(self) -> None:
        if self._meter:
            self._meter.close()

    def book(
        self, step: int, seconds: float, step_seconds: float, *, wait_seconds: float = 0.0
    ) -> None:
        """Called by all processes: what was used up to now, after `step`.

        seconds, step_seconds: age of this start, and its time in steps, as the goodput ledger of process 0 has them.
        wait_seconds: at most, of process 0, for the readings of the others.
        """
        own = {"num_devices": self._num_local, "joules": self._meter and self._meter.joules()}
        self._publish(own)
        if not job.is_main():
            return
        self._readings[0] = own
        self._collect(wait_seconds)
        total = self._total(seconds, step_seconds)
        new = _Total(*(x - y for x, y in zip(total, self._booked, strict=True)))
        if new.seconds <= 0.0:
            return
        self._booked = total
        num_measured, num_estimated = self._num_devices_heard()
        is_known = self._power is not None or num_estimated == 0
        so_far = None
        if is_known and self._kwh_before is not None:
            so_far = self._kwh_before + (total.measured + total.estimated) / energy.JOULES_PER_KWH
            so_far = round(so_far, 9)
        sources = ["nvml"] if num_measured else []
        if num_estimated:
            sources.append(self._power.source if self._power else "unknown")
        self._journal.write(
            EVENT, step=step, seconds=round(new.seconds, 3), step_seconds=round(new.step_seconds, 3),
            device=self._kind, num_devices=self._num_devices, num_hosts=self.num_hosts,
            measured_devices=num_measured, measured_joules=round(new.measured, 3),
            estimated_joules=round(new.estimated, 3) if is_known else None, source="; ".join(sources),
            kwh_so_far=so_far, co2_grams_per_kwh=self.site.grams_co2_per_kwh, pue=self.site.pue,
        )  # fmt: skip

    def _total(self, seconds: float, step_seconds: float) -> _Total:
        """A process that has not been heard of yet counts, from its start on, when it is."""
        of_device: dict[str, float] = {}  # several processes may see one device
        for reading in self._readings.values():
            for name, value in (reading["joules"] or {}).items():
                of_device[name] = max(value, of_device.get(name, 0.0))
        estimated = 0.0
        if self._power and seconds > 0:
            share = min(step_seconds / seconds, 1.0)
            device_seconds = self._num_devices_heard()[1] * seconds
            estimated = energy.joules(self._power, device_seconds, share)
        return _Total(seconds, step_seconds, sum(of_device.values()), estimated)

    def _num_devices_heard(self) -> tuple[int, int]:
        """Measured, and not."""
        found = [0, 0]
        for reading in self._readings.values():
            found[reading["joules"] is None] += reading["num_devices"]
        return found[0], found[1]

    # Readings of other processes.

    def _publish(self, own: dict[str, Any]) -> None:
        self._num_published += 1
        with contextlib.suppress(*_busy()):  # the next one says it as well
            job.publish(f"energy/{self._num_published}", own)

    def _collect(self, wait_seconds: float) -> None:
        """The newest reading of each process; `wait_seconds` at most for those of now."""
        deadline = time.monotonic() + wait_seconds
        while job.is_shared():
            now: Mapping[int, Any] = {}
            with contextlib.suppress(*_busy()):
                for number in range(self._num_forgotten + 1, self._num_published + 1):
                    now = job.published(f"energy/{number}")
                    self._readings |= now
            if len(now) == job.num_processes() or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        # The one before may still be on its way.
        while self._num_forgotten < self._num_published - 2:
            self._num_forgotten += 1
            with contextlib.suppress(*_busy()):
                job.forget(f"energy/{self._num_forgotten}")


def _busy() -> tuple[type[BaseException], ...]:
    """What the key-value store raises when it is too busy, or gone; bookkeeping ends no training."""
    import jax

    return (jax.errors.JaxRuntimeError,)


def kwh_of(entries: Iterable[Mapping[str, Any]]) -> float | None:
    """Sum of entries; None if the power of any was unknown."""
    total = 0.0
    for entry in entries:
        if entry.get("estimated_joules") is None:
            return None
        total += (entry["measured_joules"] + entry["estimated_joules"]) / energy.JOULES_PER_KWH
    return total


# ---- NVML ----


class NvmlMeter:
    """Joules of some GPUs since it was made, by their UUID: the energy counter of the board, else sampled power.

    The counter (Volta and newer) counts the whole board, also what other programs do there.
    """

    def __init__(self, nvml: Any, handles: Mapping[str, Any]):
        self._nvml, self._handles = nvml, dict(handles)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._known = dict.fromkeys(self._handles, 0.0)
        try:
            self._begun = self._counters()
        except Exception:  # an older GPU
            self._begun = None
            self._last = time.monotonic(), self._watts()  # raises where there is no power, either
            self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
            self._thread.start()

    def joules(self) -> dict[str, float]:
        """The last that are known, where the driver does not answer any more."""
        with contextlib.suppress(Exception):
            if self._begun is not None:
                now = self._counters()
                self._known = {k: max(now[k] - at, self._known[k]) for k, at in self._begun.items()}
            else:
                self._add_sample()
        return dict(self._known)

    def close(self) -> None:
        self._closing.set()
        if self._thread:
            self._thread.join()

    def _counters(self) -> dict[str, float]:
        read = (
            self._nvml.nvmlDeviceGetTotalEnergyConsumption
        )  # millijoules since the driver was loaded
        return {name: read(handle) / 1e3 for name, handle in self._handles.items()}

    def _watts(self) -> dict[str, float]:
        read = self._nvml.nvmlDeviceGetPowerUsage  # milliwatts
        return {name: read(handle) / 1e3 for name, handle in self._handles.items()}

    def _add_sample(self) -> None:
        with self._lock:
            before, watts_before = self._last
            self._last = now, watts = time.monotonic(), self._watts()
            for name in self._handles:
                mean = 0.5 * (watts[name] + watts_before[name])
                self._known[name] += mean * (now - before)

    def _sample(self) -> None:
        while not self._closing.wait(_SAMPLE_SECONDS):
            with contextlib.suppress(Exception):
                self._add_sample()


def open_nvml(devices: Sequence[Any]) -> NvmlMeter | None:
    """A meter of these devices (jax.Device, of this process); None where NVML cannot measure all of them."""
    if not devices or devices[0].platform not in ("gpu", "cuda"):
        return None
    if any(" mig " in device.device_kind.casefold() for device in devices):
        return None  # the counters are of the whole GPU
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        handle_of = _visible(pynvml)
        handles = [handle_of(device.local_hardware_id) for device in devices]
        names = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        return NvmlMeter(pynvml, dict(zip(names, handles, strict=True)))
    except (
        Exception
    ):  # not installed, no driver, a GPU that is not there: whatever it is, the table will do
        return None


def _visible(nvml: Any) -> Callable[[int], Any]:
    """From CUDA's number of a device to NVML's handle: CUDA_VISIBLE_DEVICES means nothing to NVML."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return nvml.nvmlDeviceGetHandleByIndex
    words = [word.strip() for word in listed.split(",")]

    def handle(number: int) -> Any:
        word = words[number]
        if word.isdecimal():
            return nvml.nvmlDeviceGetHandleByIndex(int(word))
        if word.startswith("MIG-"):
            raise LookupError(word)
        return nvml.nvmlDeviceGetHandleByUUID(word)

    return handle
