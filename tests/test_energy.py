"""Joules, kWh and CO2: the paper's figures for BLOOM, power by table and by NVML, entries that count nothing twice."""

import json
import math
import subprocess
import sys
import time
import types

import pytest
import tiny_run
from cluster import Cluster

from bloomjax import energy, energy_meter, job
from bloomjax.chips import GPUS, TPUS
from bloomjax.energy_meter import Energy, kwh_of, open_nvml
from bloomjax.errors import BadInput
from bloomjax.health import Health
from bloomjax.journal import Journal, read_lines
from bloomjax.ledger import Ledger, read_ledger
from bloomjax.stops import StopConditions

# ---- Luccioni et al. 2022 ----


def test_the_figures_of_bloom():
    """arXiv 2211.02001: kWh, and tonnes of each part and together, as printed there."""
    hours, site = 1_082_990, energy.Site()
    kwh = energy.joules(energy.given_power(400), hours * 3600, 1.0) / energy.JOULES_PER_KWH
    assert kwh == pytest.approx(433_196)
    dynamic, idle = energy.dynamic_tonnes(kwh, site), energy.idle_tonnes(kwh, site)
    servers, devices = energy.embodied(hours, hours / 8)
    assert (
        round(dynamic, 2) == 24.69 and round(dynamic + idle, 1) == 39.3 and round(idle, 1) == 14.6
    )
    assert servers == pytest.approx(7.57, abs=0.01) and devices == pytest.approx(3.64, abs=0.01)
    total = dynamic + idle + servers + devices
    assert round(total, 1) == 50.5
    shares = [100 * part / total for part in (servers + devices, dynamic, idle)]
    assert shares == pytest.approx([22.2, 48.9, 28.9], abs=0.05)
    # Their comparison with other models counts a PUE instead of idle infrastructure: about 30 t.
    assert energy.dynamic_tonnes(kwh, energy.Site(pue=1.2)) == pytest.approx(29.6, abs=0.05)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: energy.Site(pue=0.9), "pue is all power of a site .* got 0.9"),
        (lambda: energy.Site(-1.0), "co2_grams_per_kwh must be from 0 to 5000, got -1"),
        (lambda: energy.Site(math.nan), "co2_grams_per_kwh must be from 0 to 5000, got nan"),
        (lambda: energy.Site(idle_ratio=-0.1), "idle_ratio must be"),
        (lambda: energy.given_power(0), "draws 0 W"),
        (lambda: energy.given_power(100, 200), "draws 100 W, and 200 W when it waits"),
        (lambda: energy.grams_of("mars"), "no region 'mars'; there are france, "),
        (lambda: energy.chip_named("a100"), "no device 'a100'; there are a100_sxm_40, "),
        (lambda: Energy(region="mars"), "no region 'mars'"),
        (lambda: Energy(idle_device_watts=3.0), "idle_device_watts needs"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(BadInput, match=message):
        wrong()


# ---- power ----


def test_power_by_device_kind():
    for chip in (TPUS | GPUS).values():
        power = energy.power_of(f"NVIDIA {chip.device_kind}" if chip.name in GPUS else chip.device_kind)  # fmt: skip
        assert (power and power.watts) == chip.watts
    # The names that drivers report, with NVIDIA's data sheets.
    sheets = {
        "NVIDIA A100-SXM4-80GB": 400, "NVIDIA A100-PCIE-40GB": 250, "NVIDIA A100 80GB PCIe": 300,
        "NVIDIA H100 80GB HBM3": 700, "NVIDIA H100 PCIe": 350, "NVIDIA H100 NVL": 400, "NVIDIA H200": 700,
        "NVIDIA H200 NVL": 600, "Tesla V100-SXM2-16GB": 300, "Tesla T4": 70, "NVIDIA L4": 72,
        "NVIDIA L40S": 350, "NVIDIA L40": 300, "TPU v4": 192,
    }  # fmt: skip
    for kind, watts in sheets.items():
        found = energy.power_of(kind)
        assert found and found.watts == watts, kind
        assert found.idle_watts == (90 if kind == "TPU v4" else pytest.approx(0.2 * watts))
    for kind in ("cpu", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU v4 lite", "NVIDIA GH200 480GB",
                 "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "AMD Instinct MI300X"):  # fmt: skip
        assert energy.power_of(kind) is None, kind


def test_duty():
    power = energy.given_power(400, 100)
    assert energy.joules(power, 3600, 1) == 400 * 3600
    assert energy.joules(power, 10 * 3600, 0.25) == (0.25 * 400 + 0.75 * 100) * 10 * 3600


# ---- NVML, made up ----


class Device:
    def __init__(self, number, kind="NVIDIA A100-SXM4-80GB", platform="gpu"):
        self.local_hardware_id, self.device_kind, self.platform = number, kind, platform


@pytest.fixture
def nvml(monkeypatch):
    """A pynvml of two GPUs that draw 300 W and 400 W, and a clock by hand; `lacks` is what the driver cannot do."""
    found = types.ModuleType("pynvml")
    state = types.SimpleNamespace(now=50.0, watts=[300.0, 400.0], lacks=set(), inits=0)
    past = [7e6, 9e6]  # joules since the driver was loaded
    last = [50.0]

    def spend():
        for number, watts in enumerate(state.watts):
            past[number] += watts * (state.now - last[0])
        last[0] = state.now

    def may(name):
        if name in state.lacks:
            raise RuntimeError(f"NVMLError_NotSupported: {name}")

    def init():
        may("init")
        state.inits += 1

    def counter(handle):
        may("counter")
        spend()
        return int(past[handle] * 1000)

    def usage(handle):
        may("power")
        return int(state.watts[handle] * 1000)

    def by_index(number):
        assert 0 <= number < 2
        return number

    found.nvmlInit = init
    found.nvmlDeviceGetHandleByIndex = by_index
    found.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-a": 0, "GPU-b": 1}[uuid]
    found.nvmlDeviceGetUUID = lambda handle: f"GPU-{'ab'[handle]}"
    found.nvmlDeviceGetTotalEnergyConsumption = counter
    found.nvmlDeviceGetPowerUsage = usage
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(energy_meter, "_SAMPLE_SECONDS", 1e6)
    clock = types.SimpleNamespace(monotonic=lambda: state.now, sleep=time.sleep)
    monkeypatch.setattr(energy_meter, "time", clock)
    return state


def test_nvml_counts_from_the_start_of_the_run(nvml):
    meter = open_nvml([Device(0), Device(1)])
    assert meter and meter.joules() == {"GPU-a": 0.0, "GPU-b": 0.0}
    nvml.now += 10
    assert meter.joules() == pytest.approx({"GPU-a": 3000, "GPU-b": 4000})
    nvml.lacks.add("counter")  # the driver is gone: what is known stays known
    nvml.now += 10
    assert meter.joules() == pytest.approx({"GPU-a": 3000, "GPU-b": 4000})
    meter.close()


def test_sampled_power_where_there_is_no_counter(nvml):
    nvml.lacks.add("counter")
    meter = open_nvml([Device(1)])
    assert meter
    nvml.now, nvml.watts[1] = nvml.now + 10, 200.0
    assert meter.joules() == {"GPU-b": pytest.approx(10 * (400 + 200) / 2)}
    nvml.now += 5
    assert meter.joules() == {"GPU-b": pytest.approx(3000 + 5 * 200)}
    meter.close()


@pytest.mark.parametrize(
    "visible, devices, names",
    [
        ("1,0", [0, 1], ["GPU-b", "GPU-a"]),
        ("1", [0], ["GPU-b"]),
        ("GPU-b", [0], ["GPU-b"]),
        ("MIG-1", [0], None),
        ("0", [1], None),  # not there
    ],
)
def test_visible_devices(nvml, monkeypatch, visible, devices, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = open_nvml([Device(number) for number in devices])
    assert (meter and list(meter.joules())) == names


def test_no_nvml(nvml, monkeypatch):
    assert open_nvml([Device(0, "cpu", "cpu")]) is None and open_nvml([]) is None
    assert open_nvml([Device(0, "NVIDIA A100-SXM4-80GB MIG 1g.10gb")]) is None
    assert nvml.inits == 0
    nvml.lacks |= {"counter", "power"}
    assert open_nvml([Device(0)]) is None
    nvml.lacks = {"init"}
    assert open_nvml([Device(0)]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_nvml([Device(0)]) is None


# ---- entries ----


def entries(model_dir):
    return [e for e in read_lines(model_dir / "journal.jsonl")[0] if e["event"] == "energy"]


def opened(model_dir, devices, num_devices=None, **arguments):
    book = Energy(**arguments)
    book.open(devices, num_devices or len(devices), Journal(model_dir, job.is_main()))
    return book


def test_entries_are_differences_over_restarts(tmp_path):
    """By hand: 2 A100 at 400 W in steps and 80 W else. A start that is killed loses what is after its last entry."""
    devices = [Device(0), Device(1)]
    first = opened(tmp_path, devices, use_nvml=False)
    first.book(10, 100.0, 60.0)
    first.book(20, 200.0, 150.0)
    first.book(20, 200.0, 150.0)  # nothing since: no line
    # killed at an age of 260
    second = opened(tmp_path, devices, use_nvml=False, region="us-central1", pue=1.1)
    second.book(30, 50.0, 0.0)
    found = entries(tmp_path)
    assert [e["seconds"] for e in found] == [100, 100, 50]
    assert [e["step_seconds"] for e in found] == [60, 90, 0]
    expected = [2 * (60 * 400 + 40 * 80), 2 * (90 * 400 + 10 * 80), 2 * 50 * 80]
    assert [e["estimated_joules"] for e in found] == pytest.approx(expected)
    assert found[-1]["kwh_so_far"] == pytest.approx(sum(expected) / 3.6e6, abs=1e-9)
    assert kwh_of(found) == pytest.approx(sum(expected) / 3.6e6)
    assert (found[0]["co2_grams_per_kwh"], found[0]["pue"]) == (57.0, 1.0)
    assert (found[2]["co2_grams_per_kwh"], found[2]["pue"]) == (412.72, 1.1)
    assert found[0]["source"] == "table: 400 W training, 80 W waiting"


def test_measured_entries(nvml, tmp_path):
    book = opened(tmp_path, [Device(0), Device(1)])
    nvml.now += 10
    book.book(1, 10.0, 10.0)
    nvml.now, nvml.watts = nvml.now + 20, [100.0, 100.0]
    book.book(2, 30.0, 10.0)
    book.close()
    found = entries(tmp_path)
    assert [e["measured_joules"] for e in found] == pytest.approx([7000, 4000])
    assert [e["estimated_joules"] for e in found] == [0, 0] and found[0]["source"] == "nvml"
    assert found[1]["kwh_so_far"] == pytest.approx(11_000 / 3.6e6, abs=1e-9)
    unmeasured = opened(tmp_path, [Device(0), Device(1)], use_nvml=False)
    unmeasured.book(3, 10.0, 10.0)
    assert entries(tmp_path)[-1]["source"].startswith("table")


def test_power_that_nobody_knows(tmp_path):
    book = opened(tmp_path, [Device(0, "cpu", "cpu")])
    book.book(1, 10.0, 8.0)
    (found,) = entries(tmp_path)
    assert (found["estimated_joules"], found["kwh_so_far"]) == (None, None)
    assert found["source"] == "unknown" and kwh_of([found]) is None
    given = opened(tmp_path, [Device(0, "cpu", "cpu")], device_watts=65.0)
    given.book(2, 10.0, 8.0)
    assert entries(tmp_path)[1]["estimated_joules"] == pytest.approx(8 * 65 + 2 * 13)
    assert entries(tmp_path)[1]["kwh_so_far"] is None  # of what came before nothing is known


class Store:
    """job's key-value store, for processes that take turns in this one."""

    def __init__(self, monkeypatch, num):
        self.here, self.num, self.values = 0, num, {}
        monkeypatch.setattr(job, "is_main", lambda: self.here == 0)
        monkeypatch.setattr(job, "is_shared", lambda: True)
        monkeypatch.setattr(job, "num_processes", lambda: num)
        monkeypatch.setattr(job, "publish", self.publish)
        monkeypatch.setattr(job, "published", lambda key: dict(self.values.get(key, {})))
        monkeypatch.setattr(job, "forget", lambda key: self.values.pop(key, None))

    def publish(self, key, value):
        assert self.here not in self.values.setdefault(key, {}), "a key twice"
        self.values[key][self.here] = json.loads(json.dumps(value))

    def on(self, number):
        self.here = number


def test_processes_are_added_up_and_a_late_one_is_in_the_next_entry(nvml, tmp_path, monkeypatch):
    store = Store(monkeypatch, 3)
    books = []
    for number, devices in enumerate([[Device(0)], [Device(1)], [Device(1)]]):
        store.on(number)
        # 2 sees the GPU of 1, too, and must not count it again.
        books.append(opened(tmp_path, devices, num_devices=3))

    def booked(step, age, *numbers):
        for number in sorted(numbers, reverse=True):  # 0 reads what the others have said
            store.on(number)
            books[number].book(step, age, age)

    nvml.now += 10
    booked(1, 10.0, 0, 1)
    nvml.now += 10
    booked(2, 20.0, 0, 1, 2)
    nvml.now += 10
    booked(3, 30.0, 0)  # the others say nothing: they are in the next one
    nvml.now += 10
    booked(4, 40.0, 0, 1, 2)
    found = entries(tmp_path)
    assert [e["measured_devices"] for e in found] == [2, 3, 3, 3]
    assert [e["measured_joules"] for e in found] == pytest.approx([7000, 7000, 3000, 11_000])
    assert len(store.values) <= 3, "what is read is forgotten"


def test_processes_with_and_without_nvml(nvml, tmp_path, monkeypatch):
    """One that has not been heard of is not estimated before it is known that it does not measure."""
    store = Store(monkeypatch, 2)
    books = [opened(tmp_path, [Device(0)], num_devices=2)]
    store.on(1)
    books.append(opened(tmp_path, [Device(1)], num_devices=2, use_nvml=False))
    nvml.now += 10
    store.on(0)
    books[0].book(1, 10.0, 5.0)
    nvml.now += 10
    store.on(1)
    books[1].book(2, 0.0, 0.0)  # only process 0 has a ledger
    store.on(0)
    books[0].book(2, 20.0, 10.0)
    found = entries(tmp_path)
    assert [e["measured_joules"] for e in found] == pytest.approx([3000, 3000])
    assert [e["estimated_joules"] for e in found] == pytest.approx([0, 10 * 400 + 10 * 80])
    assert found[1]["source"] == "nvml; table: 400 W training, 80 W waiting"


def test_a_busy_store_ends_nothing(tmp_path, monkeypatch):
    import jax

    def busy(*_):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    store = Store(monkeypatch, 2)
    book = opened(tmp_path, [Device(0)], num_devices=2, use_nvml=False)
    for name in ("publish", "published", "forget"):
        monkeypatch.setattr(job, name, busy)
    for step in range(1, 5):
        book.book(step, 10.0 * step, 10.0 * step)
    assert [e["estimated_joules"] for e in entries(tmp_path)] == [4000.0] * 4
    assert store.here == 0


# ---- whole runs ----


class StopAt(StopConditions):
    """As SIGTERM after some step."""

    def __init__(self, step):
        super().__init__()
        self._left = step + 1

    def is_stop_due(self):
        self._left -= 1
        self.stopped_by = "SIGTERM" if self._left == 0 else None
        return self.stopped_by is not None


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on(tiny_text, tmp_path):
    """Entries with each save and at the end of each start; together they are the time that goodput.jsonl has."""
    model_dir = tmp_path / "run"
    for stops in (StopAt(7), StopConditions()):
        health = Health(stops=stops, energy=Energy(device_watts=50.0, idle_device_watts=10.0))
        tiny_run.run(tiny_text, model_dir, train_steps=15, health=health)
    found, journal = entries(model_dir), read_lines(model_dir / "journal.jsonl")[0]
    assert [e["step"] for e in found] == [7, 7, 10, 15, 15]
    assert [e["event"] for e in journal if e["event"] != "energy"] == [
        "start", "save", "stop", "start", "save", "save", "done",
    ]  # fmt: skip
    starts, _ = read_ledger(model_dir / "goodput.jsonl")
    total = sum(start.seconds for start in starts)
    in_steps = sum(x.seconds for s in starts for x in s.intervals if x.phase == "step")
    assert sum(e["step_seconds"] for e in found) == pytest.approx(in_steps, abs=0.05)
    seconds = sum(e["seconds"] for e in found)
    assert 0.5 * total < seconds <= total  # but for the texts at the end
    joules = sum(e["estimated_joules"] for e in found)
    assert joules == pytest.approx(10 * seconds + 40 * in_steps, abs=2.5)
    assert found[-1]["kwh_so_far"] == pytest.approx(joules / 3.6e6, abs=1e-8)
    assert all(e["num_devices"] == e["num_hosts"] == 1 and e["device"] == "cpu" for e in found)


def test_a_run_that_fails_has_an_entry(tiny_text, tmp_path):
    class Broken(StopConditions):
        def is_stop_due(self):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        health = Health(stops=Broken(), energy=Energy())
        tiny_run.run(tiny_text, tmp_path / "run", train_steps=5, health=health)
    assert [e["step"] for e in entries(tmp_path / "run")] == [0]


@pytest.mark.slow
def test_two_processes(tiny_text, tmp_path):
    """Of gin/pretrain.gin; process 0 estimates for both, and their last entry has all devices."""
    model_dir = tmp_path / "run"
    line = tiny_run.command(
        tiny_text, model_dir, "--gin.train.mesh=@MeshShape()", "--gin.TRAIN_STEPS=12", "--gin.Energy.device_watts=50.0",
    )  # fmt: skip
    ended = Cluster(line, 2).end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    found = entries(model_dir)
    assert found and found[-1]["num_devices"] == 4 and found[-1]["num_hosts"] == 1
    seconds, steps = (sum(e[name] for e in found) for name in ("seconds", "step_seconds"))
    assert sum(e["estimated_joules"] for e in found) == pytest.approx(
        4 * (10 * seconds + 40 * steps), rel=1e-3
    )


def test_the_ledger_counts_its_steps(tmp_path, monkeypatch):
    from bloomjax import ledger

    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(ledger.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(ledger, "process_age_seconds", lambda: 5.0)
    monkeypatch.setattr(Ledger, "_has_booked", False)
    book = Ledger(tmp_path, flush_seconds=1e6)
    for phase, seconds in (("compile", 3), ("step", 10), ("save", 2), ("step", 4)):
        book.enter(phase)
        clock.now += seconds
    assert book.seconds() == (24.0, 14.0)
    book.finished_step(3)
    book.finished_step(3)  # done again: a new line of the same phase
    book.note_plan(num_steps=9)
    clock.now += 1
    assert book.seconds() == (25.0, 15.0)
    book.close()
    assert book.seconds() == Ledger(tmp_path, enabled=False).seconds() == (0.0, 0.0)


def test_formulas_and_meter_load_no_jax():
    program = "import sys, bloomjax.energy_meter; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # fmt: skip
    assert result.stdout == "False\n"
