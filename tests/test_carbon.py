"""tools/carbon.py: the paper's figures from the command line, a run's entries added up by hand, bad input."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parent.parent / "tools" / "carbon.py"
_SPEC = importlib.util.spec_from_file_location("carbon", _PATH)
assert _SPEC and _SPEC.loader
carbon = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(carbon)

BLOOM = ("--device_hours=1082990", "--device=a100_sxm_80")


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            carbon.main(["carbon", *map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture
def answer(run):
    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0 and not err, err
        return json.loads(out)

    return call


def entry(seconds, step_seconds, **changes):
    found = {
        "time": 1.0, "event": "energy", "step": 1, "seconds": seconds, "step_seconds": step_seconds,
        "device": "NVIDIA H100 80GB HBM3", "num_devices": 16, "num_hosts": 2, "measured_devices": 16,
        "measured_joules": 7.2e6, "estimated_joules": 0.0, "source": "nvml", "kwh_so_far": 2.0,
        "co2_grams_per_kwh": 100.0, "pue": 1.1,
    }  # fmt: skip
    return found | changes


def write(model_dir, *lines, name="journal.jsonl"):
    model_dir.mkdir(exist_ok=True)
    (model_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return model_dir


# ---- device hours ----


def test_bloom(run, answer):
    code, out, err = run(*BLOOM)
    assert code == 0 and not err
    for figure in ("433,196 kWh", "24.69 t", "14.63 t", "39.32 t", "11.21 t", "50.53 t"):
        assert f" {figure} " in out, figure
    found = answer(*BLOOM)
    rounded = {"kwh": 433_196, "with_idle_tonnes": 39.3, "total_tonnes": 50.5}
    assert {name: round(found[name], 1) for name in rounded} == rounded
    assert round(found["dynamic_tonnes"], 2) == 24.69


def test_other_sites_and_devices(answer):
    found = answer(*BLOOM, "--region=us-central1", "--pue=1.2", "--idle_ratio=0")
    assert found["dynamic_tonnes"] == pytest.approx(433_196 * 1.2 * 412.72 / 1e6)
    assert found["total_tonnes"] == found["dynamic_tonnes"] + found["embodied_tonnes"]
    found = answer(*BLOOM, "--co2_grams_per_kwh=1000", "--device_watts=100")
    assert found["kwh"] == 108_299 and found["dynamic_tonnes"] == pytest.approx(108.299)
    chips = answer("--device_hours=44676", "--device=v4")
    assert chips["kwh"] == pytest.approx(44676 * 0.192)
    assert chips["embodied_devices_tonnes"] == pytest.approx(0.150)
    assert chips["embodied_servers_tonnes"] == pytest.approx(2.5 / 4)  # four chips a host
    assert answer("--device_hours=10", "--device=mi300x", "--device_watts=750")["kwh"] == 7.5


# ---- a run ----


def test_entries_are_added_up(run, answer, tmp_path):
    """By hand: 16 GPUs for 1.5 h, 4 kWh measured, 1 estimated; other lines of the journal do not matter."""
    model_dir = write(
        tmp_path / "run", {"time": 0.0, "event": "start"}, entry(3600, 3000),
        {"time": 1.5, "event": "spike", "measured_joules": 1e9},
        entry(1800, 900, measured_devices=8, estimated_joules=3.6e6, source="nvml; table"),
    )  # fmt: skip
    found = answer(model_dir)
    assert (found["kwh"], found["measured_kwh"], found["estimated_kwh"]) == (5.0, 4.0, 1.0)
    assert (found["device_hours"], found["server_hours"]) == (24, 3)
    assert found["step_share"] == pytest.approx(3900 / 5400)
    assert found["dynamic_tonnes"] == pytest.approx(5 * 1.1 * 100 / 1e6)  # the run's own site
    assert found["embodied_tonnes"] == pytest.approx((24 * 150 + 3 * 2500) / 44_676 / 1e3)
    assert found["total_tonnes"] == pytest.approx(
        found["dynamic_tonnes"] + 5 * 256_646 / 433_196 * 100 / 1e6 + found["embodied_tonnes"]
    )
    assert answer(model_dir, "--region=france", "--pue=1")["dynamic_tonnes"] == pytest.approx(
        5 * 57e-6
    )
    code, out, _ = run(f"--model_dir={model_dir}")
    assert code == 0
    assert "2 entries of journal.jsonl, 1:30:00 of 16 x NVIDIA H100 80GB HBM3, 72.2% of it" in out
    assert "measured 4 kWh, estimated 1 kWh; nvml; table" in out


def test_power_that_was_not_known_may_be_given(run, answer, tmp_path):
    cpu = dict(device="cpu", num_devices=1, num_hosts=1, measured_devices=0, measured_joules=0.0)
    model_dir = write(tmp_path / "run", entry(3600, 1800, estimated_joules=None, **cpu))
    found = answer(model_dir)
    assert [found[k] for k in ("kwh", "dynamic_tonnes", "total_tonnes")] == [None] * 3
    assert found["embodied_tonnes"] == pytest.approx(2.5 / 44_676)  # a server, no GPU
    assert "energy unknown: nobody has published what a cpu draws" in run(model_dir)[1]
    found = answer(model_dir, "--device_watts=100", "--idle_device_watts=10")
    assert found["kwh"] == pytest.approx(0.055)
    # What was measured stays.
    write(tmp_path / "run", entry(3600, 3600))
    assert answer(model_dir, "--device_watts=100")["kwh"] == 2.0


def ledger_lines(pid, created, steps):
    age = 0.0
    for phase, seconds in (("start", 10.0), ("step", steps)):
        age += seconds
        yield {
            "run": f"{created}-{pid}", "phase": phase, "host": "n", "pid": pid, "created": created,
            "time": created + age, "seconds": seconds, "age_seconds": age, "first_step": 1, "last_step": 5,
        }  # fmt: skip


def test_a_run_without_entries(answer, tmp_path):
    """Two starts of 16 A100: 10 s at 80 W, then steps at 400 W."""
    lines = [*ledger_lines(7, 1000.0, 90.0), *ledger_lines(8, 2000.0, 190.0)]
    model_dir = write(tmp_path / "run", *lines, name="goodput.jsonl")
    begun = dict(event="start", device="NVIDIA A100-SXM4-80GB", num_devices=16)
    begun |= {"processes": [{"host": "a"}, {"host": "b"}]}
    write(model_dir, begun | {"time": 1005.0, "pid": 7}, begun | {"time": 2005.0, "pid": 8})
    found = answer(model_dir)
    assert found["kwh"] == pytest.approx(16 * (20 * 80 + 280 * 400) / 3.6e6)
    assert found["seconds"] == 300 and found["seconds_not_counted"] == 0
    assert found["counted"] == "2 starts in goodput.jsonl"


def test_what_is_not_in_an_entry_is_said(run, answer, tmp_path):
    model_dir = write(tmp_path / "run", entry(60.0, 60.0), entry(60.0, 60.0))
    write(model_dir, *ledger_lines(7, 1000.0, 170.0), name="goodput.jsonl")
    assert answer(model_dir)["seconds_not_counted"] == 60.0
    assert "not counted: 1:00 after the last entry of a start, 2 kWh" in run(model_dir)[1].replace(
        "0:01:00", "1:00"
    )


def test_damaged_lines(run, tmp_path):
    lines = [
        entry(60.0, 60.0), entry(60.0, "x"), entry(60.0, 60.0, measured_joules=None),
        entry(60.0, 60.0, estimated_joules=-1.0),
    ]  # fmt: skip
    model_dir = write(tmp_path / "run", *lines)
    with (model_dir / "journal.jsonl").open("a") as file:
        file.write('{"event": "ener')
    code, out, err = run(model_dir)
    assert code == 0 and "1 entries" in out
    assert "3 energy entries" in err and "line 5 cannot be read" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give the MODEL_DIR of a run, or --device_hours and --device"),
        (["nowhere"], "nowhere is no folder"),
        (["."], "has no journal.jsonl: is it the MODEL_DIR of a run?"),
        (["empty"], "empty has neither energy entries in journal.jsonl"),
        (["empty", "--device=v4"], "--device is for --device_hours"),
        (["--device_hours=5"], "--device_hours needs --device: a100_sxm_40, "),
        (["--device_hours=5", "--device=v5"], "no device 'v5'; there are a100_sxm_40, "),
        (["--device_hours=5", "--device=v5p"], "nobody has published what a v5p draws"),
        (["--device_hours=-5", "--device=v4"], "--device_hours=-5.0 must be above 0"),
        (["--device_hours=nan", "--device=v4"], "--device_hours=nan must be above 0"),
        ([*BLOOM, "--region=mars"], "no region 'mars'; there are france, "),
        ([*BLOOM, "--region=france", "--co2_grams_per_kwh=5"], "give --region or"),
        ([*BLOOM, "--pue=0.5"], "from 1 to 10, got 0.5"),
        ([*BLOOM, "--device_watts=-1"], "a device that draws -1 W"),
        ([*BLOOM, "--idle_device_watts=1"], "--idle_device_watts needs --device_watts"),
        (["nowhere", *BLOOM], "give the MODEL_DIR of a run, or"),
    ],
)  # fmt: skip
def test_bad_input(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty", {"time": 1.0, "event": "start"})
    code, out, err = run(*arguments)
    assert code == 1 and not out and err.count("\n") == 1
    assert err.startswith("bloomjax: ") and message in err


def test_it_loads_no_jax():
    program = f"import runpy, sys; sys.argv = ['carbon', *{list(BLOOM)}]\ntry: runpy.run_path({str(_PATH)!r}, run_name='__main__')\nexcept SystemExit: print('jax' in sys.modules)"  # fmt: skip # noqa: E501
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # fmt: skip
    assert out.stdout.splitlines()[-1] == "False"
