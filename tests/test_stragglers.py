"""Who is slow, from what each process says about itself."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from cluster import Cluster, checked, host, without_gloo

from bloomjax import stragglers
from bloomjax.errors import BadInput
from bloomjax.stragglers import MatrixProducts, Stragglers, compare

WORKER = str(Path(__file__).with_name("stragglers_worker.py"))


def published(name, host_seconds, devices=None, step_seconds=1.0):
    return {
        "host": name, "host_seconds": host_seconds, "step_seconds": step_seconds,
        "probe_seconds": devices or {},
    }  # fmt: skip


# ---- who is slow ----


def test_a_slow_host_is_named():
    found = compare(
        {0: published("a", 0.1), 1: published("b", 0.11), 2: published("c", 0.2), 3: published("d", 0.1)},
        1.3, 1.1,
    )  # fmt: skip
    assert found["host_seconds"] == {"a#0": 0.1, "b#1": 0.11, "c#2": 0.2, "d#3": 0.1}
    assert found["slow"] == [
        {"host": "c", "process": 2, "device": None, "seconds": 0.2, "median": 0.1}
    ]


def test_of_two_hosts_the_slow_one_is_named():
    for number in (0, 1):
        both = {0: published("a", 0.1), 1: published("a", 0.1)}
        both[number] = published("a", 0.14)
        (slow,) = compare(both, 1.3, 1.1)["slow"]
        assert (slow["process"], slow["median"]) == (number, 0.1)
        assert not compare(both, 1.5, 1.1)["slow"]


def test_a_host_that_hides_behind_its_devices_is_not_slow():
    reports = {0: published("a", 0.001), 1: published("b", 0.005)}
    assert not compare(reports, 1.3, None)["slow"]  # 4 ms of a step of a second
    of_short_steps = {n: report | {"step_seconds": 0.1} for n, report in reports.items()}
    assert [slow["host"] for slow in compare(of_short_steps, 1.3, None)["slow"]] == ["b"]
    unknown = {n: report | {"step_seconds": None} for n, report in reports.items()}
    found = compare(unknown, 1.3, None)
    assert found["step_seconds"] is None and [slow["host"] for slow in found["slow"]] == ["b"]


def test_the_slow_device_of_384_is_named():
    """BLOOM's, of 2022-04-28: one slow GPU, 149 -> 140 TFLOPs for all."""
    rng = np.random.default_rng(0)
    reports = {
        node: published(
            f"node{node}", 0.1, {str(8 * node + n): 1e-3 * rng.uniform(0.98, 1.02) for n in range(8)}
        )
        for node in range(48)
    }  # fmt: skip
    assert not compare(reports, 1.3, 1.06)["slow"]
    reports[31]["probe_seconds"]["251"] = 1.07e-3
    (slow,) = compare(reports, 1.3, 1.06)["slow"]
    assert (slow["host"], slow["process"], slow["device"]) == ("node31", 31, 251)
    assert slow["seconds"] == 1.07e-3 and 0.98e-3 < slow["median"] < 1.02e-3
    assert not compare(reports, 1.3, None)["slow"]
    assert len(compare(reports, 1.3, None)["probe_seconds"]) == 384


# ---- a process alone ----


def test_a_process_alone_reports_at_once():
    watched = Stragglers(every_steps=5, probe_size=32)
    reports = {}
    for step in range(1, 13):
        watched.host_step(step / 1000)
        if report := watched.report(step):
            reports[step] = report
    assert list(reports) == [5, 10] and reports[5]["step"] == 5
    name = f"{host()}#0"
    assert reports[5]["host_seconds"] == {name: 0.003}  # medians of 1..5 and 6..10 ms
    assert reports[10]["host_seconds"] == {name: 0.008}
    assert reports[5]["step_seconds"] is None and reports[10]["step_seconds"] > 0
    assert reports[5]["probe_seconds"].keys() == {str(d.id) for d in jax.local_devices()}
    assert all(0 < seconds < 1 for seconds in reports[5]["probe_seconds"].values())
    assert reports[5]["slow"] == reports[10]["slow"] == []
    json.dumps(reports)


def test_after_a_roll_back_the_same_steps_come_again():
    watched = Stragglers(every_steps=2, probe_size=0)
    found = [watched.report(step) for step in (1, 2, 3, 4, 3, 4, 5, 6)]
    assert [report and report["step"] for report in found] == [None, 2, None, 4, None, 4, None, 6]
    assert found[5]["step_seconds"] is None and found[7]["step_seconds"] > 0


def test_none_is_none():
    assert Stragglers(every_steps=None).report(100) is None
    watched = Stragglers(every_steps=1, probe_size=0)
    assert watched.report(1)["probe_seconds"] == {}


def test_probes_take_a_small_share_of_the_time(monkeypatch):
    calls = []

    def probe(device, size):
        calls.append((device, size))
        time.sleep(0.002)
        return 0.001

    monkeypatch.setattr(stragglers, "_probe", probe)
    monkeypatch.setattr(stragglers, "_PROBE_SHARE", 0.1)
    watched = Stragglers(every_steps=1, probe_size=48)
    start = time.monotonic()
    step = 0
    while time.monotonic() - start < 1.0:
        step += 1
        report = watched.report(step)
        assert report and len(report["probe_seconds"]) == 8
        time.sleep(0.001)
    spent = 0.002 * len(calls)
    assert len(calls) % 8 == 0 and calls[0] == (jax.devices()[0], 48)
    assert 8 < len(calls) and spent < 0.2, (step, len(calls))


def test_the_probe_leaves_the_mesh_of_the_loop_alone(mesh_of):
    mesh = mesh_of(2, 2, 2)
    device = jax.devices()[3]
    with jax.set_mesh(mesh):
        assert 0 < MatrixProducts(device, 32, 2).seconds() < 10
        assert jax.sharding.get_mesh() == mesh


def test_products_are_computed_and_stay_in_range():
    """Else a compiler might leave them out, or the device compute with infinities."""
    program = MatrixProducts(jax.devices()[0], 64, 16)
    text = program._program.lower(np.float32(0.37)).compile().as_text()
    assert "dot" in text and "while" in text
    row, column = np.arange(64.0)[:, None], np.arange(64.0)[None]
    factor = np.sin(np.pi * (row + 1) * (column + 1) / 65) * (2 / 65) ** 0.5
    np.testing.assert_allclose(factor @ factor, np.eye(64), atol=1e-12)
    start = np.sin(0.37 * (row + 1) * (column + 4))
    product = start @ np.linalg.matrix_power(factor, 15)
    assert 0.5 < np.std(product) < 1 and np.abs(product).max() < 10
    program = MatrixProducts(jax.devices()[0], 64, 15)
    np.testing.assert_allclose(program._program(np.float32(0.37)), product.sum(), rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every_steps": 0}, "every_steps must be at least 1"),
        ({"slow_factor": 1.0}, "a factor of 1.0 would make every one slow"),
        ({"device_slow_factor": 0.9}, "a factor of 0.9 would make every one slow"),
        ({"probe_size": -1}, "probe_size must not be negative"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(BadInput, match=message):
        Stragglers(**given)


# ---- several processes ----


@pytest.mark.slow
def test_three_processes_one_slow():
    given = {"num_steps": 22, "slow_process": 2, "slow_seconds": 0.03}
    results = checked(
        Cluster([sys.executable, WORKER, json.dumps(given)], 3, num_devices=6).end(60)
    )
    *reports, left = map(json.loads, without_gloo(results[0][1]).splitlines())
    assert [report["step"] for report in reports][-1] == 20 and len(reports) > 1
    for report in reports:
        assert report["host_seconds"].keys() == {f"{host()}#{number}" for number in range(3)}
        assert len(report["probe_seconds"]) == 6
        assert {slow["process"] for slow in report["slow"] if slow["device"] is None} == {2}
        (slow,) = report["slow"]
        assert slow["seconds"] > 0.03 and slow["host"] == host()
    assert left == []  # nothing piles up in the coordinator
