"""Hosts and devices that are slower than the others, found without a collective and without waiting for anybody.

In a synchronous step all wait for the slowest, so step times say nothing about who it is. Two numbers do: how long each
host needed by itself, and how long each device takes for the same small product of matrices.
"""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bloomjax import job
from bloomjax.errors import BadInput

_LOOK_SECONDS = 1.0  # between two looks for what the other processes have published
_PROBE_REPEATS = 3
# Of the time of training that probes may take; what costs more is done at every second report, every third, ...
_PROBE_SHARE = 0.002
# A host that is late by less than this share of a step is hidden behind the devices, which work meanwhile.
_HIDDEN_SHARE = 0.02
_CPU_PROBE_SIZE = 256
_CHAIN_LENGTH = 16


class Stragglers:
    """Publishes what this process needs and, on the main process, compares all.

    Args:
      every_steps: between two reports; None: none.
      slow_factor: a host is slow if a step costs it this much more than the median host.
      device_slow_factor: likewise a device, for the probe.
      probe_size: of the probe, 16 products of two square matrices in bfloat16; 0: no probe. On CPUs, whose virtual
        devices share the cores, it is at most 256 (float32), and its times are given but not judged.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = 100,
        slow_factor: float = 1.3,
        device_slow_factor: float = 1.1,
        probe_size: int = 4096,
    ):
        if every_steps is not None and every_steps < 1:
            raise BadInput(
                f"Stragglers.every_steps must be at least 1 (None: no reports), got {every_steps}"
            )
        if not min(slow_factor, device_slow_factor) > 1:
            raise BadInput(
                f"Stragglers: a factor of {min(slow_factor, device_slow_factor)} would make every one slow; "
                "slow_factor and device_slow_factor must be above 1"
            )
        if probe_size < 0:
            raise BadInput(f"Stragglers.probe_size must not be negative, got {probe_size}")
        self.every_steps = every_steps
        self._slow_factor = slow_factor
        self._device_slow_factor = device_slow_factor
        self._probe_size = probe_size
        self._host_seconds: list[float] = []
        self._probe_seconds: dict[str, float] = {}
        self._next_probe = 0.0  # of the monotonic clock
        self._reported: tuple[int, float] | None = None  # step and clock of the report before
        self._num_reports = 0  # not the step: after a roll back that comes again
        self._open: dict[int, tuple[int, dict[str, Any]]] = {}  # reports not yet told: step, own
        self._next_look = 0.0

    def host_step(self, seconds: float) -> None:
        """What this host needed by itself for a step: input and dispatch, not waiting for devices."""
        self._host_seconds.append(seconds)

    def report(self, step: int) -> dict[str, Any] | None:
        """Asked after every step. On the main process now and then the newest numbers that all have published:

        `step`; `host_seconds` {host#process: median of a step}; `step_seconds`, the whole step; `probe_seconds`
        {device id: of one product}; `slow`, a list of host, process, device (None: the host itself), seconds, median.
        """
        if self.every_steps is None:
            return None
        if step % self.every_steps == 0:
            self._publish(step)
        return self._collect() if self._open else None

    def _publish(self, step: int) -> None:
        now = time.monotonic()
        step_seconds = None
        if self._reported and step > self._reported[0]:
            step_seconds = (now - self._reported[1]) / (step - self._reported[0])
        if self._probe_size and now >= self._next_probe:
            self._probe_seconds = {
                str(device.id): _probe(device, self._probe_size) for device in jax.local_devices()
            }
            cost, now = time.monotonic() - now, time.monotonic()
            self._next_probe = now + cost / _PROBE_SHARE
        self._reported = step, now
        own = {
            "host": os.uname().nodename,
            "host_seconds": statistics.median(self._host_seconds or [0.0]),
            "step_seconds": step_seconds,
            "probe_seconds": self._probe_seconds,
        }
        self._host_seconds = []
        if job.is_main():
            self._open[self._num_reports] = step, own
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # too busy: this report is never told
            job.publish(f"stragglers/{self._num_reports}", own)
        self._num_reports += 1
        self._next_look = 0.0

    def _collect(self) -> dict[str, Any] | None:
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + _LOOK_SECONDS
        for number in sorted(self._open, reverse=True):
            step, own = self._open[number]
            found = {0: own}
            if job.is_shared():
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    found = job.published(f"stragglers/{number}")
            if len(found) == job.num_processes():
                self._forget_up_to(number)
                judges = jax.default_backend() != "cpu"
                device_factor = self._device_slow_factor if judges else None
                return {"step": step} | compare(found, self._slow_factor, device_factor)
        return None

    def _forget_up_to(self, number: int) -> None:
        for each in [each for each in self._open if each <= number]:
            del self._open[each]
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                job.forget(f"stragglers/{each}")


def compare(
    reports: Mapping[int, Mapping[str, Any]],
    slow_factor: float,
    device_slow_factor: float | None,
) -> dict[str, Any]:
    """What `Stragglers.report` returns, without the step, from what each process has published.

    The median of an even number is the lower of the two in the middle, so that of two hosts the slow one is named.
    `device_slow_factor` None: devices are not judged.
    """
    names = {number: f"{reports[number]['host']}#{number}" for number in sorted(reports)}
    host_seconds = {names[number]: reports[number]["host_seconds"] for number in names}
    probes = {number: reports[number]["probe_seconds"] for number in names}
    of_steps = [report["step_seconds"] for report in reports.values() if report["step_seconds"]]
    step_seconds = statistics.median(of_steps) if of_steps else None
    slow = []
    median = statistics.median_low(host_seconds.values())
    for number, name in names.items():
        seconds = host_seconds[name]
        is_hidden = step_seconds and seconds - median < _HIDDEN_SHARE * step_seconds
        if seconds > slow_factor * median and not is_hidden:
            slow.append(_slow(reports[number]["host"], number, None, seconds, median))
    of_devices = [seconds for found in probes.values() for seconds in found.values()]
    if of_devices and device_slow_factor is not None:
        median = statistics.median_low(of_devices)
        for number, found in probes.items():
            for device, seconds in found.items():
                if seconds > device_slow_factor * median:
                    slow.append(
                        _slow(reports[number]["host"], number, int(device), seconds, median)
                    )
    return {
        "host_seconds": {name: round(seconds, 6) for name, seconds in host_seconds.items()},
        "step_seconds": step_seconds and round(step_seconds, 6),
        "probe_seconds": {k: round(v, 9) for found in probes.values() for k, v in found.items()},
        "slow": slow,
    }


def _slow(
    host: str, process: int, device: int | None, seconds: float, median: float
) -> dict[str, Any]:
    return {
        "host": host, "process": process, "device": device, "seconds": round(seconds, 9),
        "median": round(median, 9),
    }  # fmt: skip


def _probe(device: Any, size: int) -> float:
    """Seconds of one product, the best of a few. The device ends what it was given before; no other takes part."""
    if device.platform == "cpu":
        program = MatrixProducts(device, min(size, _CPU_PROBE_SIZE), 1)
    else:
        program = MatrixProducts(device, size, _CHAIN_LENGTH)
    program.seconds()  # behind the steps that are under way
    return min(program.seconds() for _ in range(_PROBE_REPEATS))


class MatrixProducts:
    """`num_products` products of two [size, size] matrices, one after the other, on one device.

    They are made up in the program, so that no memory of the device is taken in between. bfloat16; float32 on CPUs,
    which have no fast bfloat16.
    """

    def __init__(self, device: Any, size: int, num_products: int):
        self._device, self._num_products = device, num_products
        dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
        self._program = _products(size, num_products, dtype)

    def seconds(self) -> float:
        """Of one product, measured now."""
        # A mesh of this device alone: the loop of training runs under that of all devices.
        with jax.set_mesh(Mesh(np.array([self._device]), ("one",))):
            seed = jax.device_put(np.float32(0.37), self._device)
            seed.block_until_ready()
            start = time.monotonic()
            self._program(seed).block_until_ready()
        return (time.monotonic() - start) / self._num_products


@functools.cache
def _products(size: int, num_products: int, dtype: Any):
    def run(seed: jax.Array) -> jax.Array:
        row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) + 1
        column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1) + 1
        # The sine transform is orthogonal, so numbers neither grow nor vanish: the power that a device draws, and so
        # its clock, depends on them.
        angle = (row * column % (2 * size + 2)).astype(jnp.float32) * (np.pi / (size + 1))
        factor = (jnp.sin(angle) * (2 / (size + 1)) ** 0.5).astype(dtype)
        start = jnp.sin(seed * (row * (column + 3)).astype(jnp.float32)).astype(dtype)
        product = jax.lax.fori_loop(0, num_products, lambda _, x: (x @ factor).astype(dtype), start)
        return jnp.sum(product, dtype=jnp.float32)

    return jax.jit(run)
