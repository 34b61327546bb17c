"""tools/bench_node.py: what it measures is there and of the right size, and the bad node is found among many."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

_PATH = tiny_run.REPOSITORY / "tools" / "bench_node.py"
_SPEC = importlib.util.spec_from_file_location("bench_node", _PATH)
assert _SPEC and _SPEC.loader
bench_node = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench_node)

SMALL = ("--matrix_size=64", "--copy_mib=1", "--repeats=2")


@pytest.fixture
def run(capsys):
    """run(*flags): exit code, stdout and stderr."""

    def call(*flags):
        with pytest.raises(SystemExit) as end:
            bench_node.main(["bench_node", *map(str, flags)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


# ---- measuring ----


def test_this_host(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu017")
    code, out, err = run(*SMALL, f"--output={tmp_path}/new/{{host}}.json")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "new" / "gpu017.json").read_text())
    assert record["host"] == "gpu017" and record["failed"] == [] and record["device_kind"] == "cpu"
    assert record["settings"] == {"matrix_size": 64, "copy_bytes": 2**20, "num_devices": 8}
    assert [found["device"] for found in record["devices"]] == list(range(8))
    for found in record["devices"]:
        assert all(0 < found[name] < 1e4 for name in bench_node.OF_DEVICE)
    assert 0 < record["all_reduce_gb_per_second"] < 1e4
    lines = out.splitlines()
    assert lines[0] == "gpu017: 8 x cpu, matrices of 64, copies of 1 MiB" and len(lines) == 11
    assert f"{record['devices'][7]['matmul_tflops']:.4g}" in lines[9]


def test_json_is_one_object(run):
    code, out, _ = run(*SMALL, "--json")
    assert code == 0 and json.loads(out)["settings"]["matrix_size"] == 64


def test_rates_follow_from_times(monkeypatch):
    """With times that are known: 2 n^3 FLOPs; a copy reads and writes; a ring of n sends 2 (n - 1) / n."""
    from bloomjax.stragglers import MatrixProducts

    monkeypatch.setattr(MatrixProducts, "seconds", lambda self: 1e-3)
    assert bench_node.matmul_rates(jax.devices()[:2], 100, 3) == [pytest.approx(0.002)] * 2
    monkeypatch.setattr(bench_node, "median_seconds", lambda run, repeats: 1e-3)
    found = bench_node.copy_rates(jax.devices()[1], 2**20, 1)
    assert found["copy_gb_per_second"] == pytest.approx(2 * 2**20 / 1e6)
    assert found["to_device_gb_per_second"] == pytest.approx(2**20 / 1e6)
    rate = bench_node.all_reduce_rate(jax.devices()[:4], 2**20, 1)
    assert rate == pytest.approx(2 * 3 / 4 * 2**20 / 1e6)
    assert bench_node.all_reduce_rate(jax.devices()[:1], 2**20, 1) is None


def test_a_sum_over_devices_is_one(monkeypatch):
    """Not something that the compiler could leave out."""
    results = []
    monkeypatch.setattr(
        bench_node, "median_seconds", lambda run, repeats: results.append(run()) or 1.0
    )
    bench_node.all_reduce_rate(jax.devices()[:4], 2**10, 1)
    (result,) = results
    assert result.sharding.device_set == set(jax.devices()[:4])
    np.testing.assert_array_equal(result, np.full((1, 2**8), 4.0))


def test_one_wrong_number_in_a_product_is_found(monkeypatch, run):
    assert bench_node.computes_right(jax.devices()[2], 64)
    right = jnp.matmul
    monkeypatch.setattr(jnp, "matmul", lambda *a, **b: right(*a, **b).at[17, 5].add(1.0))
    assert not bench_node.computes_right(jax.devices()[2], 64)
    monkeypatch.setattr(bench_node, "computes_right", lambda device: device.id != 6)
    code, _, err = run(*SMALL)
    assert code == 3
    assert err.endswith("device 6: a product of matrices is wrong\n") and err.count("\n") == 1


def test_what_a_device_refuses_is_written_down(monkeypatch, run, tmp_path):
    def fails(device, *_):
        if device.id == 3:
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE:\n uncorrectable"
            )
        return {"copy_gb_per_second": 1.0}

    monkeypatch.setattr(bench_node, "copy_rates", fails)
    code, out, err = run(*SMALL, f"--output={tmp_path}/x.json")
    reason = "device 3, copies: INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable"
    assert code == 3 and err == f"bench_node: {bench_node.this_host()}: {reason}\n"
    assert json.loads((tmp_path / "x.json").read_text())["failed"] == [reason]
    assert out.splitlines()[5].split()[0] == "3" and " - " in out.splitlines()[5]
    code, out, _ = run(f"--compare={tmp_path}")
    assert code == 3 and reason in out


def test_a_host_without_devices(monkeypatch, run, tmp_path):
    def fails():
        raise RuntimeError("Unable to initialize backend 'cuda': no device")

    monkeypatch.setattr(jax, "local_devices", fails)
    code, _, err = run(f"--output={tmp_path}/x.json")
    assert code == 3 and "no devices: Unable to initialize backend" in err
    monkeypatch.undo()
    assert run(f"--compare={tmp_path}")[0] == 3


# ---- comparing ----


def hosts(folder, number=48, seed=0):
    """Records of as many hosts of 8 devices, within 1 % of one another. Devices 4 to 7 are on the other socket."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for node in range(number):
        devices = [
            {
                "device": n,
                "matmul_tflops": 250 * rng.uniform(0.995, 1.005),
                "copy_gb_per_second": 1700 * rng.uniform(0.995, 1.005),
                "to_device_gb_per_second": (24 if n < 4 else 16) * rng.uniform(0.9, 1.1),
                "from_device_gb_per_second": (22 if n < 4 else 15) * rng.uniform(0.9, 1.1),
            }
            for n in range(8)
        ]
        write(folder, {
            "host": f"node{node:02}", "time": "2026-11-21T00:00:00+00:00", "failed": [],
            "device_kind": "NVIDIA A100", "jax": "0.10.2", "devices": devices,
            "settings": {"matrix_size": 8192, "copy_bytes": 2**29, "num_devices": 8},
            "all_reduce_gb_per_second": 230 * rng.uniform(0.99, 1.01),
        })  # fmt: skip


def write(folder, record):
    (folder / f"{record['host']}.json").write_text(json.dumps(record))


def change(folder, host, **changes):
    path = folder / f"{host}.json"
    record = json.loads(path.read_text())
    write(folder, record | changes)
    return record


def slower(folder, host, device, rate, factor):
    record = json.loads((folder / f"{host}.json").read_text())
    record["devices"][device][rate] *= factor
    write(folder, record)


def test_the_node_of_bloom(run, tmp_path):
    """One device of 384, 2.5 % slower, as in April 2022."""
    hosts(tmp_path / "bench")
    code, out, err = run(f"--compare={tmp_path}/bench", "--tolerance=0.02")
    assert (code, err) == (0, "") and out.startswith("48 hosts, tolerance 2.0%\n")
    slower(tmp_path / "bench", "node31", 3, "matmul_tflops", 0.975)
    code, out, _ = run(f"--compare={tmp_path}/bench", "--tolerance=0.02")
    assert code == 3
    assert out.splitlines()[-1].startswith("node31: device 3, products, TFLOP/s: 24")
    assert "% below 250" in out.splitlines()[-1] or "% below 249" in out.splitlines()[-1]
    code, out, _ = run(f"--compare={tmp_path}/bench")  # five percent
    assert code == 0 and "node31, device 3" in out  # the slowest is shown all the same


@pytest.mark.parametrize(
    ("rate", "factor"),
    [("copy_gb_per_second", 0.9), ("to_device_gb_per_second", 0.5), ("all_reduce_gb_per_second", 0.5)],
)  # fmt: skip
def test_other_rates(run, tmp_path, rate, factor):
    hosts(tmp_path, 5)
    assert run(f"--compare={tmp_path}")[0] == 0
    if rate in bench_node.OF_HOST:
        change(tmp_path, "node02", **{rate: 115.0})
    else:
        slower(tmp_path, "node02", 5, rate, factor)
    code, out, _ = run(f"--compare={tmp_path}", "--json")
    found = json.loads(out)
    assert code == 3 and list(found["found"]) == ["node02"] and len(found["hosts"]) == 5
    (row,) = [row for row in found["rates"] if row["is_slow"]]
    assert (row["host"], row["rate"]) == ("node02", rate)
    assert row["share"] == pytest.approx(factor, abs=0.1)


def test_of_two_hosts_the_slow_one_is_named(run, tmp_path):
    hosts(tmp_path, 2)
    change(tmp_path, "node01", all_reduce_gb_per_second=200.0)
    code, out, _ = run(f"--compare={tmp_path}/node00.json,{tmp_path}/node01.json")
    assert code == 3 and out.splitlines()[-1].startswith("node01: sum over devices, GB/s: 200, 1")


def test_the_newest_of_a_host_counts(run, tmp_path):
    hosts(tmp_path, 3)
    old = json.loads((tmp_path / "node01.json").read_text())
    old |= {"time": "2026-11-20T00:00:00+00:00", "failed": ["device 1: broken"]}
    (tmp_path / "a.json").write_text(json.dumps(old))
    assert run(f"--compare={tmp_path}/*.json")[0] == 0
    (tmp_path / "z.json").write_text(json.dumps(old | {"time": "2026-11-22T00:00:00+00:00"}))
    assert run(f"--compare={tmp_path}")[0] == 3


def test_the_list_that_the_launcher_reads(run, tmp_path):
    hosts(tmp_path / "bench", 8)
    listed = tmp_path / "bad_nodes"
    listed.write_text("# by hand\nnode05, node[10-12]  # since March")
    for host, device in (("node03", 1), ("node03", 2), ("node05", 0)):
        slower(tmp_path / "bench", host, device, "matmul_tflops", 0.9)
    change(tmp_path / "bench", "node07", failed=["device 1: a product of matrices is wrong"])
    command = (f"--compare={tmp_path}/bench", f"--exclude_file={listed}")
    code, out, _ = run(*command)
    assert code == 3 and out.splitlines()[-1] == f"{listed}: added node03, node07"
    before, text = "# by hand\nnode05, node[10-12]  # since March\n", listed.read_text()
    assert text.startswith(before)
    third, seventh = text.removeprefix(before).splitlines()
    assert third.startswith("node03  # 20") and third.count("products, TFLOP/s") == 1
    assert seventh.endswith(" bench_node: device 1: a product of matrices is wrong")
    assert run(*command)[0] == 3 and listed.read_text() == text  # not twice
    done = subprocess.run(
        [tiny_run.REPOSITORY / "tools" / "launch_slurm.sh", "--model-dir=/m", f"--exclude-file={listed}",
         "--dry-run", "--", "--gin_file=x"],
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--exclude=node05\\,node\\[10-12\\]\\,node03\\,node07 " in done.stdout


def test_comparing_does_not_load_jax(tmp_path):
    """It runs where the job is launched, which has no devices."""
    hosts(tmp_path, 2)
    program = (
        "import sys, runpy\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(_PATH), f"--compare={tmp_path}"]
    done = tiny_run.execute(command)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


# ---- one line ----

WRONG = {
    "nothing there": (["--compare={tmp}/nowhere"], "--compare={tmp}/nowhere: there is no {tmp}/nowhere"),
    "empty folder": (["--compare={tmp}/empty"], "--compare={tmp}/empty: no file *.json in {tmp}/empty"),
    "cut off": (["--compare={tmp}/cut.json"], "--compare: {tmp}/cut.json is no file that bench_node"),
    "something else": (["--compare={tmp}/else.json"], "--compare: {tmp}/else.json is no file that"),
    "not like": (["--compare={tmp}/bench"], "--compare: node00 has device_kind NVIDIA A100, node02 has cpu"),
    "tolerance": (["--compare={tmp}/bench", "--tolerance=5"], "--tolerance=5.0 must be between 0 and 1"),
    "size": (["--matrix_size=0"], "--matrix_size=0 must be at least 1"),
    "alone": (["--exclude_file={tmp}/x"], "--exclude_file takes what --compare finds"),
    "both": (["--compare={tmp}/bench", "--output={tmp}/x"], "--output is of a measurement"),
    "folder": (["--output={tmp}/empty"], "--output={tmp}/empty is a folder; name a file in it, as"),
    "below a file": (["--output={tmp}/cut.json/x"], "--output={tmp}/cut.json/x: "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case, run, tmp_path):
    flags, message = WRONG[case]
    (tmp_path / "empty").mkdir()
    hosts(tmp_path / "bench", 3)
    change(tmp_path / "bench", "node02", device_kind="cpu")
    (tmp_path / "cut.json").write_text('{"host": "a", "ti')
    (tmp_path / "else.json").write_text('["host"]')
    code, out, err = run(*(flag.format(tmp=tmp_path) for flag in flags))
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"bloomjax: {message.format(tmp=tmp_path)}")
