"""benchmarks/: each runs at a toy size and says what it promises, and what is wrong is refused before it is timed."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from reference_bloom import jit
from test_flash_attention import PlainKernel

from bloomjax import attention, attention_kernels, config, flops, model, startup
from bloomjax.errors import BadInput

_FOLDER = tiny_run.REPOSITORY / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(_FOLDER)
    import bench_attention
    import bench_peers
    import bench_step
    import matmul_ceiling
    import measure
    import shapes

TOY = ("--size", "toy", "--device", "cpu", "--rounds", "2")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Programs that are compiled in a hurry, and a process that stays as it is."""
    monkeypatch.setattr(startup, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(measure, "choose_platform", lambda name: None)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(capsys):
    """run(script, *arguments): exit code and what --json printed, which is all of stdout."""

    def call(script, *arguments):
        code = script.main([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def has_circumstances(report):
    assert {
        "date",
        "machine",
        "cores",
        "load_average",
        "python",
        "versions",
        "device_kind",
    } <= report.keys()
    assert report["versions"]["jax"] == jax.__version__ and "bloomjax" in report["versions"]


# ---- sizes ----


@pytest.mark.parametrize("size", ["560m", "1b1", "1b7", "3b", "7b1"])
def test_a_size_is_what_its_gin_file_says(size):
    given = [f"{name} = 'x'" for name in ("MODEL_DIR", "STORE_DIR", "VOCABULARY")]
    built = {
        name: config.build(f"train.{name}", f"{size}.gin", given) for name in ("model", "step")
    }
    setting = shapes.setting(size, "cpu", hardware=[])
    assert setting.config == built["model"].config and setting.step == built["step"]
    assert flops.num_params(**setting.dims) == setting.config.expected_params
    assert (setting.rows, setting.length) == (8, 2048)
    overlay = shapes.setting(size, "gpu")
    text = (config.gin_dir() / "hardware/h200_1.gin").read_text()
    assert f"microbatch_size_samples = {overlay.step.microbatch_size_samples}\n" in text


def test_changes():
    changes = ["BloomConfig.remat_policy=full", "StepOptions.loss_chunk_tokens=7", "adamw.b1 = 0.5"]
    setting = shapes.setting("small", "cpu", rows=3, changes=changes)
    assert (setting.config.remat_policy, setting.step.loss_chunk_tokens) == ("full", 7)
    assert (setting.tokens, setting.config.vocab_size) == (3 * 512, 16_384)
    for wrong, message in {
        "BloomConfig.remat=full": "gin: Configurable 'BloomConfig' doesn't have a parameter named 'remat'.",
        "remat=full": "--set=remat=full: write NAME.FIELD=VALUE, as BloomConfig.remat_policy=full",
        "BloomConfig.remat_policy=fuller": "no remat_policy 'fuller'; there are: none, minimal, full",
        "Blom.x=1": "gin: No configurable matching 'Blom'.",
    }.items():
        with pytest.raises(BadInput) as error:
            shapes.setting("small", "cpu", changes=[wrong])
        assert str(error.value) == message
    with pytest.raises(BadInput, match="^no size '2b'; there are: toy, small, head, 560m, "):
        shapes.setting("2b", "cpu")


# ---- the clock and the command line ----


def test_rounds_have_as_many_calls_as_take_their_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        seconds = iter(seconds)

        def call():
            now[0] += next(seconds)

        return call

    slow = takes([1.0, 1.0, 3.0, 2.0])
    quick = takes([0.5, 0.25, 0.5, 0.75, 0.25, 0.75, 0.75])
    found = measure.time_in_turns([slow, quick], num_rounds=3, round_seconds=0.9)
    assert found[0] == (2.0, 1.0, 3, 1)
    assert found[1] == (0.5, 0.375, 3, 2)


@pytest.mark.parametrize("script", [bench_step, bench_attention, bench_peers, matmul_ceiling])
def test_bad_input_is_one_line(script, capsys, tmp_path):
    for arguments, message in {
        ("--wrong",): "unrecognized arguments: --wrong",
        ("--rounds", "0"): "argument --rounds: '0' is no whole number from 1 on",
        ("--device", "abacus"): "argument --device: invalid choice: 'abacus'",
    }.items():
        with pytest.raises(SystemExit) as end:
            script.main(list(arguments))
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and message in err and err.count("\n") == 1
    with pytest.raises(BadInput, match="is a folder; name a file in it"):
        script.main(["--output", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="^--output=.*file/x: "):
        script.main(["--output", str(tmp_path / "file/x")])
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/script.py"])
        measure.run(lambda: shapes.setting("2b", "cpu"))
    assert str(end.value.code).startswith("script.py: no size '2b'")


def test_a_device_that_is_not_there():
    with pytest.raises(BadInput, match="^no tpu for JAX here"):
        measure.device("tpu")


# ---- matrix products ----


def test_products_are_all_that_a_step_has():
    """Their FLOPs are those of `flops` but for attention's; in microbatches and chunks of the loss, too."""
    setting = shapes.setting("1b7", "cpu", changes=["StepOptions.microbatch_size_samples=2"])
    found = matmul_ceiling.products(setting)
    c = setting.config
    attention_flops = 3 * 2 * setting.tokens * c.num_layers * setting.length * c.emb_dim
    per_step = flops.flops_per_step(
        **setting.dims, sequence_length_tokens=setting.length, batch_size_samples=setting.rows
    ).causal
    assert sum(p.flops * p.times for p in found) == pytest.approx(per_step - attention_flops)
    (mlp,) = [p for p in found if p.name == "mlp_in"]
    assert (mlp.m, mlp.k, mlp.n) == (2 * 2048, 2048, 4 * 2048)
    assert {p.n for p in found if p.name == "head"} == {250_880}


def test_the_ceiling(run, monkeypatch):
    rates = {64: 1e12, 512: 3e12}  # by the width that products differ in
    monkeypatch.setattr(matmul_ceiling, "rate", lambda m, k, n, *_: rates[max(64, n if n == 512 else k)]
                        if 512 in (k, n) else 2e12)  # fmt: skip
    code, report = run(matmul_ceiling, *TOY)
    has_circumstances(report)
    (found,) = report["sizes"]
    shares = {p["tflops"]: 0.0 for p in found["products"]}
    for p in found["products"]:
        shares[p["tflops"]] += p["share_of_flops"]
    assert code == 0 and sum(shares.values()) == pytest.approx(1) and len(shares) == 2
    assert found["tflops"] == pytest.approx(1 / sum(share / rate for rate, share in shares.items()))


# ---- attention ----

_ATTENTION = (
    "--lengths",
    64,
    "--tokens",
    128,
    "--round_seconds",
    0.001,
    "--head_dims",
    64,
    "--cases",
    "plain",
)


def test_attention(run):
    code, report = run(bench_attention, *TOY, *_ATTENTION, "--kernels", "xla_blocked", "flash_gpu")
    assert code == 0 and report["skipped"] == []
    has_circumstances(report)
    assert report["refused"] == {
        "flash_gpu": "attention kernel 'flash_gpu' is for GPUs, and this is a CPU; 'auto' takes what fits"
    }
    (check,) = report["checks"].values()
    assert check["wrong"] == [] and 0 < check["worst"] < 1e-2
    assert [(r["variant"], r["pass"]) for r in report["rows"]] == [
        (variant, what) for what in ("forward", "forward+backward") for variant in ("ALiBi", "no ALiBi")
    ]  # fmt: skip
    row = report["rows"][0]
    assert (row["kernel"], row["heads"], row["head_dim"], row["rows"], row["length"]) == (
        "xla_blocked",
        4,
        16,
        2,
        64,
    )
    assert row["tflops"] * 1e12 * row["seconds"] == pytest.approx(
        2 * 2 * 4 * 64 * 64 * 16
    )  # 2 x 2BHSSK / 2
    assert row["scores"]["std"] == pytest.approx(1, abs=0.15) and row["kept_share"] is None


@dataclasses.dataclass(frozen=True)
class Float32Kernel(PlainKernel):
    """A flash kernel for this test's GPU, which is a CPU."""

    def forward(self, inputs):
        context, lse = super().forward(_in_float32(inputs))
        return context.astype(inputs.v_BSHK.dtype), lse

    def backward(self, inputs, lse, delta, g):
        grads = super().backward(_in_float32(inputs), lse, delta, g.astype(jnp.float32))
        return tuple(grad.astype(g.dtype) for grad in grads)


def _in_float32(inputs):
    q, k, v = (a.astype(jnp.float32) for a in inputs[:3])
    return inputs._replace(q_BLHK=q, k_BSHK=k, v_BSHK=v)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(attention_kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda name: Float32Kernel())


@pytest.mark.slow
def test_skipping(run, on_gpu):
    arguments = ("--kernels", "flash_gpu", "--lengths", 512, "--tokens", 512, "--score_std", 0.1)
    code, report = run(bench_attention, *TOY, *_ATTENTION, *arguments)
    assert code == 0
    skipping = [r for r in report["rows"] if r["variant"] == "ALiBi, skipping"]
    assert len(skipping) == 2 and len(report["rows"]) == 6
    for row in skipping:
        assert 0.1 < row["kept_share"] < 0.9
        assert row["loss_moves"]["mean"] < 1e-6 < row["loss_moves"]["loss"]
        assert row["scores"]["std"] == pytest.approx(0.1, rel=0.15)
    # Blocks of 16 queries and 8 keys, by the bound's own words.
    arrays = bench_attention.normal_inputs(1, 512, 4, 16, 0.1)
    q, k = (np.asarray(a, np.float64)[0] for a in arrays[:2])
    own = np.einsum("lhk,lhk->hl", q, k) / 4
    norms = [np.linalg.norm(a, axis=-1).T for a in (q, k)]
    kept = every = 0
    for h, slope in enumerate(attention.alibi_slopes(4)):
        for first in range(0, 512, 16):
            for key in range(0, first + 16, 8):
                rows = np.arange(first, first + 16)
                most = norms[0][h, rows] * norms[1][h, key : key + 8].max() / 4 + slope * (
                    key + 7 - rows
                )
                kept += np.any(most >= own[h, rows] - np.log(512 * 2.0**24))
                every += 1
    assert skipping[0]["kept_share"] == pytest.approx(kept / every, abs=0.01)


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("too many keys", "NaN")]


@pytest.mark.parametrize("kind", ["no ALiBi", "raises", *_SLOW])
def test_a_wrong_kernel_is_not_timed(run, on_gpu, monkeypatch, kind):
    right = attention_kernels.attend

    def attend(name, q, k, v, slopes, **options):
        if kind == "raises":
            raise RuntimeError("illegal instruction\nmore")
        if kind == "too many keys":
            next_key_L = jnp.minimum(jnp.arange(q.shape[1]) + 1, q.shape[1] - 1)
            options["last_key_BL"] = next_key_L[None].repeat(len(q), 0)
        context = right(name, q, k, v, slopes * (kind != "no ALiBi"), **options)
        return context * jnp.nan if kind == "NaN" else context

    monkeypatch.setattr(attention_kernels, "attend", attend)
    monkeypatch.setattr(bench_attention, "time_kernel", None)
    code, report = run(bench_attention, *TOY, *_ATTENTION, "--kernels", "flash_gpu")
    (line,) = report["checks"]["flash_gpu"]["wrong"]
    expected = "RuntimeError: illegal instruction" if kind == "raises" else "context "
    assert code == 1 and report["rows"] == [] and line.startswith(f"plain, head_dim 64: {expected}")
    assert "flash_gpu: WRONG" in bench_attention.table(report)


# ---- a step ----


def test_step(run, tmp_path, monkeypatch):
    """But for the comparison with float32, which takes its time; it is in the slow tests."""
    same = {"loss": 6.0, "grad_norm": 2.0, "parameters": {"a": 1.0}}
    check = bench_step.compare(same, same, "bfloat16")
    monkeypatch.setattr(bench_step, "check_step", lambda *_: check)
    monkeypatch.setattr(matmul_ceiling, "rate", lambda *_: 2e12)
    output = tmp_path / "new" / "step.json"
    code, report = run(
        bench_step, *TOY, "--round_seconds", 0.001, "--variants", "as configured", "--output", output
    )  # fmt: skip
    assert code == 0 and json.loads(output.read_text()) == report
    has_circumstances(report)
    (row,) = report["rows"]
    assert (row["name"], row["device"], row["dtype"]) == ("as configured", "cpu", "bfloat16")
    assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"], abs=0.1)
    per_token = flops.flops_per_token(
        vocab_size=512, emb_dim=64, num_layers=2, mlp_dim=256, sequence_length_tokens=32
    ).causal
    assert row["model_tflops"] * 1e12 == pytest.approx(per_token * 64 / row["step_seconds"])
    assert row["share_of_ceiling"] == pytest.approx(row["model_tflops"] / 2)
    assert row["mfu"] is None and row["not_in_hfu"] == []
    assert 1e6 < row["program_bytes"] < row["peak_bytes"]
    assert row["last_loss"] < row["first_loss"] == pytest.approx(np.log(512), abs=0.1)
    assert bench_step.table(report).splitlines()[-1].count("no peak known") == 3


@pytest.mark.slow
def test_a_wrong_step_is_not_timed(monkeypatch):
    """One without ALiBi; plain attention, with which it is compared, stays right."""
    right = attention_kernels.attend
    monkeypatch.setattr(
        model, "attend",
        lambda name, q, k, v, slopes, **options: right(name, q, k, v, slopes * (name == "xla"), **options),
    )  # fmt: skip
    monkeypatch.setattr(bench_step, "time_steps", None)
    with pytest.raises(BadInput, match="^the step is wrong: .*; nothing was timed$"):
        bench_step.main(list(TOY))


def test_differences_of_a_step():
    exact = {"loss": 6.0, "grad_norm": 2.0, "parameters": {"a": 1.0, "b": 1e-9}}
    ours = {"loss": 6.006, "grad_norm": 2.02, "parameters": {"a": 0.97, "b": 3e-9}}
    found = bench_step.compare(ours, exact, "bfloat16")
    assert found["differences"] == pytest.approx(
        {"loss": 1e-3, "grad_norm": 1e-2, "parameter": 3e-2}
    )
    for change in (
        {"loss": 6.1},
        {"grad_norm": float("nan")},
        {"parameters": {"a": 1.1, "b": 0.0}},
    ):
        with pytest.raises(BadInput, match="the step is wrong"):
            bench_step.compare(ours | change, exact, "bfloat16")
    with pytest.raises(BadInput, match=r"\(float32 allows 0.0001\)"):
        bench_step.compare(ours, exact, "float32")


def test_scores_get_the_spread_that_was_asked_for():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.0048 * rng.standard_normal((1, 256, 3, 4, 64)), jnp.float32)
    params = {"layers": {"qkv": {"kernel": kernel}, "mlp": 1}, "embedding": 2}
    spread = bench_step.spread_scores(params, 3.0)
    found = np.asarray(spread["layers"]["qkv"]["kernel"], np.float64)
    x = rng.standard_normal((100, 256))
    q, k, v = np.moveaxis(np.einsum("ld,dchk->lchk", x, found[0]), 1, 0)
    assert (np.einsum("lhk,shk->hls", q, k) / 8).std() == pytest.approx(3.0, rel=0.1)
    assert v.std() == pytest.approx(0.0048 * 16, rel=0.05) and spread["embedding"] == 2


# ---- peers ----


@pytest.fixture
def threads(monkeypatch):
    """Programs in threads in place of processes."""

    class Process:
        exitcode = None

        def __init__(self, target, args, daemon):
            self.thread = threading.Thread(target=target, args=args, daemon=daemon)
            self.start, self.join, self.is_alive = (
                self.thread.start,
                self.thread.join,
                lambda: False,
            )

    class Pipe(SimpleNamespace):
        close = staticmethod(lambda: None)  # one process has both ends

    def pipe():
        ours, theirs = multiprocessing.Pipe()
        return ours, Pipe(send=theirs.send, recv=theirs.recv)

    context = SimpleNamespace(Pipe=pipe, Process=Process)
    monkeypatch.setattr(bench_peers.multiprocessing, "get_context", lambda method: context)


def fake_program(loss, most_rows=8, kind="a device"):
    def program(spec):
        if (spec.microbatch or spec.rows) > most_rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 16.00 GiB")
        return (lambda n: loss), (lambda forget=False: 10**9), spec.microbatch or spec.rows, kind

    return program


@pytest.fixture
def with_torch(monkeypatch):
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: True)


def test_peers_without_torch(run, threads, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_peers, "our_program", fake_program(9.0, kind="cpu"))
    output = tmp_path / "peers.json"
    programs = ("--programs", "transformers:float32", "transformers+compile:bfloat16")
    code, rows = run(bench_peers, *TOY, *programs, "--output", output)
    assert code == 0 and {"name", "device", "dtype", "tokens_per_second", "ratio"} <= rows[0].keys()
    assert [(r["name"], r["dtype"], r["reason"]) for r in rows] == [
        ("bloomjax", "bfloat16", None), ("transformers", "float32", "no torch"),
        ("transformers+compile", "bfloat16", "no torch"),
    ]  # fmt: skip
    assert rows[0]["tokens_per_second"] > 0 and rows[0]["ratio"] == rows[0]["ratio_cpu_time"] == 1
    assert rows[0]["device"] == "cpu" and rows[0]["peak_bytes"] == 10**9
    assert rows[1]["tokens_per_second"] is rows[1]["ratio"] is None
    report = json.loads(output.read_text())
    assert report["rows"] == rows and report["in_turns"]
    assert {"date", "versions", "shape"} <= report.keys()
    assert "no torch" in bench_peers.table(report)


def test_ratios(run, threads, with_torch, monkeypatch):
    """By wall time and by CPU time, of turns; goals are those of the size."""
    monkeypatch.setattr(bench_peers, "our_program", fake_program(9.0))
    monkeypatch.setattr(bench_peers, "torch_program", fake_program(9.0))

    def step(self, num_steps, is_timed=False):
        if is_timed:  # ours: 1, 2 and 3 s
            times = len(self.turns) + 1
            self.turns.append(
                (times, times) if self.spec.name == "bloomjax" else (times * times, 3 * times)
            )
        return 1.0

    monkeypatch.setattr(bench_peers.Program, "step", step)
    _, rows = run(
        bench_peers, "--device", "cpu", "--rounds", 3, "--programs", "transformers:float32"
    )
    ours, theirs = rows
    assert (theirs["ratio"], theirs["ratio_cpu_time"], theirs["best_ratio"], theirs["goal"]) == (
        2,
        3,
        1,
        2,
    )
    assert ours["tokens_per_second"] == 2048 / 2 and theirs["tokens_per_second"] == 2048 / 4
    assert ours["goal"] is None


def test_less_rows_at_a_time_where_memory_ends(threads, with_torch, monkeypatch):
    monkeypatch.setattr(bench_peers, "torch_program", fake_program(9.0, most_rows=3))
    spec = bench_peers.Spec("transformers", "bfloat16", "toy", "gpu", 16, 32, None, None, ())
    program = bench_peers.Program(spec, timeout_seconds=20)
    program.start()
    assert (program.failure, program.microbatch, program.loss) == (None, 2, 9.0)
    program.stop()
    assert program.peak_bytes == 10**9
    monkeypatch.setattr(bench_peers, "torch_program", fake_program(9.0, most_rows=0))
    program = bench_peers.Program(spec, timeout_seconds=20)
    program.start()
    assert program.failure == "out of memory"
    assert bench_peers.row(program, program, 4.0, in_turns=False)["ratio"] is None


def test_another_loss_is_not_timed(run, threads, with_torch, monkeypatch):
    monkeypatch.setattr(bench_peers, "our_program", fake_program(9.001))
    monkeypatch.setattr(bench_peers, "torch_program", fake_program(9.0))
    code, rows = run(bench_peers, *TOY, "--programs", "transformers:float32", "bloomjax:float32")
    reasons = {(r["name"], r["dtype"]): r["reason"] for r in rows}
    assert code == 1 and reasons == {
        ("bloomjax", "bfloat16"): None, ("transformers", "float32"): None,
        ("bloomjax", "float32"): "its loss is 9.001000, that of transformers float32 9.000000 (allowed 1e-05 of it)",
    }  # fmt: skip
    assert [r["tokens_per_second"] for r in rows if r["reason"]] == [None]


def test_why_a_program_cannot_run():
    for error, expected in {
        RuntimeError("InvalidCxxCompiler: No working C++ compiler found"): "no C++ compiler",
        MemoryError(): "out of memory",
        ValueError("a\nb"): "ValueError: a",
    }.items():
        assert bench_peers.reason(error) == expected


# ---- all of it on a GPU ----

_STUB = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.argv = sys.argv[2:]
    exec(sys.argv[0])
    sys.exit()
script, arguments = sys.argv[2].rsplit("/", 1)[1], sys.argv[3:]
print(script, *arguments)
if "flash_hopper" in arguments:
    sys.exit("illegal instruction")
with open(arguments[arguments.index("--output") + 1], "w") as file:
    json.dump({{"script": script}}, file)
"""


def test_on_gpu_survives_a_part_that_fails(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(_STUB.format(python=sys.executable))
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub)}
    command = [_FOLDER / "on_gpu.sh", tmp_path / "out"]

    def call(*parts):
        return subprocess.run(
            [*command, *parts], env=environment, capture_output=True, text=True, check=False
        )

    done = call("kernels", "step_7b1")
    assert done.returncode == 1 and "6 parts, 1 failed" in done.stdout, done
    reports = [
        json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()
    ]
    assert [r["part"] for r in reports][-1] == "step_7b1" and len(reports) == 5
    log, summary = ((tmp_path / "out" / name).read_text() for name in ("log.txt", "summary.txt"))
    assert (
        "illegal instruction" in log
        and "--size 7b1 --batch 8 --set adamw.first_moment_dtype=bfloat16" in log
    )
    assert "kernels_flash_hopper: FAILED with 1" in summary and summary.count("\n") == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "log.txt",
        "results.jsonl",
        "summary.txt",
    ]
    done = call("nonsense")
    assert done.returncode == 2 and "no part is called nonsense" in done.stderr


# ---- as they are run, in processes of their own ----


def in_a_process(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, _FOLDER / f"{script}.py", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_step_with_all_variants():
    report = in_a_process(
        "bench_step", *TOY, "--round_seconds", 0.01, "--json", "--remat", "minimal"
    )
    assert [r["name"] for r in report["rows"]] == ["as configured", "no ALiBi"]
    assert report["config"]["remat_policy"] == "minimal"
    assert set(report["check"]["differences"]) == {"loss", "grad_norm", "parameter"}
    assert 0 < report["check"]["differences"]["grad_norm"] < 2e-2
    first = {r["name"]: r["first_loss"] for r in report["rows"]}
    assert first["as configured"] != first["no ALiBi"]


@pytest.mark.slow
def test_every_case_of_the_kernels():
    report = in_a_process(
        "bench_attention", *TOY, "--check_only", "--json", "--kernels", "xla_blocked"
    )
    check = report["checks"]["xla_blocked"]
    assert len(check["cases"]) == 8 and not check["wrong"]
    assert check["cases"]["float32, head_dim 64"]["dq"] < 1e-5


@pytest.mark.slow
def test_peers():
    """transformers in torch computes the same loss."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    programs = ("transformers:float32", "transformers:autocast-bfloat16")
    rows = in_a_process("bench_peers", *TOY, "--json", "--programs", *programs)
    assert len(rows) == 3 and all(r["tokens_per_second"] > 0 and r["ratio"] > 0 for r in rows), rows
    ours, theirs = (r["loss"] for r in rows[:2])
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_reference_is_that_of_the_definition():
    """One row and head, in plain sums."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.standard_normal((4, 1, 5, 1, 3))
    context, dq, _, _ = bench_attention.reference(q, k, v, g, np.array([0.3]))

    def loss(q):
        scores = q[0, :, 0] @ k[0, :, 0].T / 3**0.5
        scores = scores + 0.3 * (np.arange(5)[None] - np.arange(5)[:, None])
        e = np.where(np.tri(5, dtype=bool), np.exp(scores), 0)
        return ((e / e.sum(1, keepdims=True)) @ v[0, :, 0] * g[0, :, 0]).sum()

    step = np.zeros_like(q)
    step[0, 3, 0, 1] = 1e-6
    assert (loss(q + step) - loss(q - step)) / 2e-6 == pytest.approx(dq[0, 3, 0, 1], rel=1e-6)
    assert (context * g).sum() == pytest.approx(loss(q))
    ours = jit(attention.xla_attention)(
        *(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.array([0.3])
    )
    np.testing.assert_allclose(ours, context, rtol=1e-5)
