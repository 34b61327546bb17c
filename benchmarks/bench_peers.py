"""The same training step in bloomjax and in transformers + torch: tokens a second and peak memory.

    python benchmarks/bench_peers.py [--size small] [--device cpu] [--batch N] [--length N] [--programs P ...]
        [--json] [--output FILE]

torch runs BloomForCausalLM with its fused AdamW, eager and under torch.compile (forward, loss and backward), in float32
(with TF32 products on GPUs, as JAX has them), autocast to bfloat16, and with bfloat16 weights and moments. What cannot
run has a reason in place of a number. bloomjax has what the gin files of size and hardware say, and clips gradients.

All start from the same random weights (std 0.02) and tokens; one that computes another loss is not timed, and the exit
code is 1.
Each program lives in a process of its own. On CPUs they take turns, one step each, so that other work on the machine
hits all alike, and ratios are medians over the turns; on an accelerator, whose memory may hold only one, each runs
alone from beginning to end. Out of memory, a program is tried again with half the rows at a time, down to one.

  ratio           our tokens/s in bfloat16 / those of the row, by wall time
  ratio_cpu_time  CPU seconds of the row / ours in bfloat16, of all threads; on CPUs only. torch waits by spinning,
                  which other work on the machine makes dear; `best_...`, of the best turns: what a quiet one would show

Memory: on accelerators as the framework counts it, on CPUs what the whole process had resident while it was timed.
--json prints the rows alone: name, device, dtype, tokens_per_second, ratio, and more.
"""

import argparse
import dataclasses
import math
import multiprocessing
import os
import statistics
import time
from concurrent import futures
from importlib.util import find_spec
from typing import Any, NamedTuple

import measure
import shapes

from bloomjax.errors import BadInput

RATE = 1e-4
STD = 0.02
OURS, EAGER, COMPILED = "bloomjax", "transformers", "transformers+compile"
_THEIR_DTYPES = ("float32", "autocast-bfloat16", "bfloat16")
# (name, dtype); those with exact losses come first, for the others are compared with them.
PROGRAMS = (
    (EAGER, "float32"), (OURS, "float32"), (OURS, "bfloat16"),
    *((EAGER, dtype) for dtype in _THEIR_DTYPES[1:]), *((COMPILED, dtype) for dtype in _THEIR_DTYPES),
)  # fmt: skip
REFERENCE = (OURS, "bfloat16")
# Least ratio by size, platform and torch's dtype.
GOALS = {
    ("small", "cpu"): {"float32": 2.0, "autocast-bfloat16": 2.0, "bfloat16": 1.0},
    ("head", "cpu"): {"bfloat16": 1.0},
    ("560m", "gpu"): dict.fromkeys(_THEIR_DTYPES, 4.0),
    ("7b1", "gpu"): dict.fromkeys(_THEIR_DTYPES, 2.0),
}
_CHUNK = 2**22  # random numbers that one task draws


class Spec(NamedTuple):
    """What a process is to run; it travels there."""

    name: str
    dtype: str
    size: str
    platform: str
    rows: int
    length: int
    microbatch: int | None  # rows worked on at a time; None: what the setting says, or all
    hardware: tuple[str, ...] | None
    changes: tuple[str, ...]

    def setting(self) -> shapes.Setting:
        dtype = self.dtype if self.name == OURS else "float32"
        changes = [f"BloomConfig.dtype={dtype}", *self.changes]
        if self.microbatch is not None:
            changes.append(f"StepOptions.microbatch_size_samples={self.microbatch}")
        return shapes.setting(
            self.size, self.platform, rows=self.rows, length=self.length, hardware=self.hardware, changes=changes
        )  # fmt: skip


# ---- what both sides start from ----


def tokens_of(setting: shapes.Setting) -> Any:
    """int32 [rows, length + 1]."""
    import numpy as np

    shape = setting.rows, setting.length + 1
    return np.random.default_rng(0).integers(0, setting.config.vocab_size, shape, np.int32)


def random_params(config: Any) -> dict[tuple[str, ...], Any]:
    """Our parameters by path, float32: normal with STD, around 1 for the scales of norms; the same in each process."""
    import numpy as np

    from bloomjax import hf

    found = {path: np.empty(shape, np.float32) for path, shape in hf.leaf_shapes(config).items()}

    def fill(part, seed, mean):
        np.random.default_rng(seed).standard_normal(out=part, dtype=np.float32)
        part *= STD
        part += mean

    with futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        tasks = []
        for number, (path, array) in enumerate(sorted(found.items())):
            flat = array.reshape(-1)
            for first in range(0, flat.size, _CHUNK):
                part = flat[first : first + _CHUNK]
                mean = 1.0 if path[-1] == "scale" else 0.0
                tasks.append(threads.submit(fill, part, (number, first), mean))
        for task in tasks:
            task.result()
    return found


# ---- the two programs: step(n) does n steps and gives the last one's loss ----


def our_program(spec: Spec):
    from bloomjax import startup

    startup.claim_gpu_memory()
    startup.keep_freed_memory()  # as tiny.gin does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import abstract_state
    from bloomjax.train_step import jit_programs

    device = measure.device(spec.platform)
    mesh, setting = MeshShape(1, 1, 1).build([device]), spec.setting()
    abstract = abstract_state(setting.model, setting.optimizer, mesh)
    programs = jit_programs(setting.model, setting.optimizer, setting.step, mesh, abstract)
    arrays, params = random_params(setting.config), {}
    for path in list(arrays):
        branch = params
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = jax.device_put(arrays.pop(path), device)
    batch = {"tokens": jnp.asarray(tokens_of(setting)), "weights": jnp.ones(setting.rows)}
    arguments = jax.device_put(batch, device), np.float32(RATE), jax.random.key(0)
    with jax.set_mesh(mesh):
        executable = programs[2].lower(abstract, *arguments).compile()
    state = programs[1](params)
    del params

    def step(num_steps):
        nonlocal state
        for _ in range(num_steps):
            state, metrics = executable(state, *arguments)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def memory(forget=False):
        if forget:
            return measure.forget_peak_memory()
        return measure.peak_memory_bytes(device)

    return step, memory, setting.step.microbatch_size_samples or setting.rows, device.device_kind


def torch_model(setting: shapes.Setting, dtype: Any, device: str) -> Any:
    """BloomForCausalLM with the weights of `random_params`."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    from bloomjax import hf

    c = setting.config
    config = BloomConfig(
        vocab_size=c.vocab_size, hidden_size=c.emb_dim, n_layer=c.num_layers, n_head=c.num_heads,
        hidden_dropout=0.0, attention_dropout=0.0, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):  # nothing is drawn, or held twice
        model = BloomForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).train()
    model.tie_weights()
    params, named = random_params(c), dict(model.named_parameters())
    with torch.no_grad():
        for tensor in hf.tensors(c):
            x = params[tensor.path] if tensor.layer is None else params[tensor.path][tensor.layer]
            named.pop(hf.PREFIX + tensor.name).copy_(torch.from_numpy(tensor.to_hf(x)))
    if named:
        raise RuntimeError(f"parameters without values: {', '.join(named)}")
    return model


def torch_program(spec: Spec):
    import torch

    device = {"gpu": "cuda"}.get(spec.platform, spec.platform)
    if device == "tpu" or (device == "cuda" and not torch.cuda.is_available()):
        raise RuntimeError(f"torch has no {spec.platform.upper()} here")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    setting = spec.setting()
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
    model = torch_model(setting, dtype, device)
    tokens = torch.from_numpy(tokens_of(setting)).long().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    microbatch = min(spec.microbatch or spec.rows, spec.rows)

    def loss_of(rows):
        with torch.autocast(device, torch.bfloat16, enabled=spec.dtype == "autocast-bfloat16"):
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        )
        return loss / (setting.rows * setting.length)

    if spec.name == COMPILED:
        loss_of = torch.compile(loss_of)

    def step(num_steps):
        for _ in range(num_steps):
            optimizer.zero_grad()
            losses = []
            for rows in tokens.split(microbatch):
                loss = loss_of(rows)
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(sum(losses))

    def memory(forget=False):
        if forget:
            return (
                torch.cuda.reset_peak_memory_stats()
                if device == "cuda"
                else measure.forget_peak_memory()
            )
        return (
            torch.cuda.max_memory_allocated()
            if device == "cuda"
            else measure.peak_memory_bytes(None)
        )

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return step, memory, microbatch, kind


# ---- the process of a program ----


def serve(pipe: Any, spec: Spec) -> None:
    """Answers with ("ok", ...) or ("failed", reason, is out of memory); "stop" ends it."""
    try:
        step, memory, microbatch, kind = (our_program if spec.name == OURS else torch_program)(spec)
        pipe.send(("ok", step(1), microbatch, kind))  # of the given weights; compiles, too
        while (command := pipe.recv()) != "stop":
            if command == "forget":
                memory(forget=True)
                pipe.send(("ok",))
            elif command == "peak":
                pipe.send(("ok", memory()))
            else:
                wall, cpu = time.perf_counter(), time.process_time()
                loss = step(command)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                pipe.send(("ok", loss, wall / command, cpu / command))
    except Exception as error:
        pipe.send(("failed", reason(error), measure.is_out_of_memory(error)))


def reason(error: BaseException) -> str:
    """Why a program cannot run."""
    text = f"{type(error).__name__}: {error}"
    if "CxxCompiler" in text or "C++ compiler" in text or "find C compiler" in text:
        return "no C++ compiler"
    return measure.first_line(error)


class Failed(Exception):
    """A program cannot run: (reason, is out of memory)."""


class Program:
    """A program in its process. What goes wrong there stands in `failure`, and it is asked nothing more."""

    def __init__(self, spec: Spec, timeout_seconds: float):
        self.spec, self.timeout_seconds = spec, timeout_seconds
        self.failure: str | None = None
        self.is_wrong = False
        self.turns: list[tuple[float, float]] = []  # wall and CPU seconds of a step
        self.loss = self.last_loss = math.nan
        self.peak_bytes = self.microbatch = self.device_kind = None
        self.pipe: Any = None

    @property
    def key(self) -> tuple[str, str]:
        return self.spec.name, self.spec.dtype

    def start(self) -> None:
        """Tries less and less rows at a time, as memory allows."""
        if self.spec.name != OURS and (
            missing := [m for m in ("torch", "transformers") if not find_spec(m)]
        ):
            self.failure = f"no {missing[0]}"
        while self.failure is None:
            measure.say(
                f"starting {' '.join(self.key)}, {self.spec.microbatch or 'all'} rows at a time"
            )
            spawn = multiprocessing.get_context("spawn")
            self.pipe, child = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(child, self.spec), daemon=True)
            self.process.start()
            child.close()
            try:
                self.loss, self.microbatch, self.device_kind = self._answer()
                return
            except Failed as failed:
                why, is_out_of_memory = failed.args
            now = self.spec.microbatch or self.spec.rows
            if is_out_of_memory and now > 1:
                self.spec = self.spec._replace(microbatch=now // 2)
            else:
                self.failure = why

    def step(self, num_steps: int, is_timed: bool = False) -> float:
        """Wall seconds of one step."""
        answer = self._ask(num_steps)
        if answer is None:
            return math.inf
        self.last_loss, wall, cpu = answer
        if is_timed:
            self.turns.append((wall, cpu))
        return wall

    def forget_peak(self) -> None:
        self._ask("forget")

    def stop(self) -> None:
        """Keeps the peak of memory."""
        if self.pipe is None:  # never started
            return
        answer = self._ask("peak")
        self.peak_bytes = answer[0] if answer else None
        if self.failure is None:
            self.pipe.send("stop")
            self.process.join(60)
            self._end()

    def _ask(self, command: Any) -> Any:
        if self.failure is not None:
            return None
        try:
            self.pipe.send(command)
            return self._answer()
        except Failed as failed:
            self.failure = failed.args[0]
        except OSError:
            self.failure = "its process ended"
        return None

    def _answer(self) -> Any:
        try:
            if not self.pipe.poll(self.timeout_seconds):
                self._end()
                raise Failed(f"no answer in {self.timeout_seconds:g} s", False)
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            code = self.process.exitcode
            self._end()
            raise Failed(
                f"its process ended with {code}" + ", perhaps for memory" * (code == -9), False
            ) from None
        if answer[0] == "failed":
            self.process.join(60)
            self._end()
            raise Failed(*answer[1:])
        return answer[1:]

    def _end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


# ---- the comparison ----


def check_loss(program: Program, exact: Program) -> None:
    """A program that does not compute the same is not timed."""
    exactly = all(p.spec.dtype == "float32" for p in (program, exact))
    tolerance = (1e-5 if program.spec.platform == "cpu" else 1e-3) if exactly else 3e-3
    if not abs(program.loss - exact.loss) <= tolerance * exact.loss:
        program.stop()
        program.is_wrong = True
        program.failure = (
            f"its loss is {program.loss:.6f}, that of {' '.join(exact.key)} {exact.loss:.6f} (allowed {tolerance:.0e} "
            "of it)"
        )


def compete(programs: list[Program], num_rounds: int, round_seconds: float, in_turns: bool) -> None:
    """Starts, checks and times them; what they found is in them."""
    groups = [programs] if in_turns else [[program] for program in programs]
    exact = None
    for group in groups:
        try:
            for program in group:
                program.start()
                if program.failure is None:
                    exact = exact or program
                    check_loss(program, exact)
            for _ in range(2):
                for program in group:
                    seconds = program.step(1)
            # Turns are one step each; alone, as many as take so long.
            num_steps = 1 if in_turns else max(1, math.ceil(round_seconds / seconds))
            for program in group:
                program.forget_peak()
            for _ in range(num_rounds):
                for program in group:
                    program.step(num_steps, is_timed=True)
        finally:
            for program in group:
                program.stop()


def row(
    program: Program, reference: Program | None, goal: float | None, in_turns: bool
) -> dict[str, Any]:
    """The figures of one program; numbers are None where there are none."""
    spec = program.spec
    found = {
        "name": spec.name, "device": program.device_kind or spec.platform, "dtype": spec.dtype,
        "tokens_per_second": None, "ratio": None, "ratio_cpu_time": None, "best_ratio": None,
        "best_ratio_cpu_time": None,
        "goal": None if spec.name == OURS else goal, "wall_seconds": None, "cpu_seconds": None, "peak_bytes": None,
        "rows_at_a_time": program.microbatch, "loss": None, "last_loss": None, "reason": program.failure,
    }  # fmt: skip
    if program.failure is not None or not program.turns:
        return found
    wall, cpu = (statistics.median(turn[i] for turn in program.turns) for i in (0, 1))
    found |= {
        "tokens_per_second": round(spec.rows * spec.length / wall, 1), "wall_seconds": wall, "cpu_seconds": cpu,
        "peak_bytes": program.peak_bytes, "loss": program.loss, "last_loss": program.last_loss,
    }  # fmt: skip
    if reference is None or reference.failure is not None or not reference.turns:
        return found
    for i, name in enumerate(("", "_cpu_time")):
        if i and spec.platform != "cpu":
            continue
        mine, ours = ([turn[i] for turn in p.turns] for p in (program, reference))
        ratio = statistics.median(mine) / statistics.median(ours)
        if in_turns:
            ratio = statistics.median(a / b for a, b in zip(mine, ours, strict=True))
        found[f"ratio{name}"] = ratio
        found[f"best_ratio{name}"] = min(mine) / min(ours)
    return found


def table(report: dict[str, Any]) -> str:
    names = [
        "program",
        "dtype",
        "loss",
        "tokens/s",
        "s/step",
        "CPU s",
        "ratio",
        "CPU time",
        "best ratio",
        "best CPU",
    ]
    names += ["goal", "GB", "rows at a time", ""]
    rows = []
    for r in report["rows"]:
        speed, loss, peak = r["tokens_per_second"], r["loss"], r["peak_bytes"]
        ratios = [r[x] for x in ("ratio", "ratio_cpu_time", "best_ratio", "best_ratio_cpu_time")]
        rows.append([
            r["name"], r["dtype"], loss and f"{loss:.5f}", speed and f"{speed:,.0f}", r["wall_seconds"],
            r["cpu_seconds"],
            *(x and f"{x:.2f}" for x in ratios), r["goal"], peak and f"{peak / 1e9:.2f}", r["rows_at_a_time"],
            r["reason"] or "",
        ])  # fmt: skip
    how = "in turns, one step each" if report["in_turns"] else "each alone"
    return "\n".join([
        measure.headline(report), f"{report['shape']}; {report['rounds']} rounds, {how}",
        "ratios: ours in bfloat16 is so many times as fast, by wall time and by CPU time",
        measure.columns(names, rows, left=("dtype", "")),
    ])  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.Parser(__doc__)
    known = [f"{name}:{dtype}" for name, dtype in PROGRAMS]
    parser.add_argument("--size", default="small", help=", ".join(shapes.SIZES))
    parser.add_argument("--batch", type=measure.whole_number, help="rows")
    parser.add_argument("--length", type=measure.whole_number, help="tokens of a row")
    parser.add_argument(
        "--programs", nargs="+", choices=known, default=known, metavar="P", help=", ".join(known)
    )
    parser.add_argument(
        "--torch_microbatch",
        type=measure.whole_number,
        help="rows torch works on at a time, at most",
    )
    parser.add_argument(
        "--set", action="append", default=[], help="NAME.FIELD=VALUE, as in bench_step.py"
    )
    parser.add_argument("--gin_file", action="append", help="of the hardware, as in bench_step.py")
    parser.add_argument("--rounds", type=measure.whole_number, default=9)
    parser.add_argument(
        "--round_seconds", type=float, default=1.0, help="of a round, where each runs alone"
    )
    parser.add_argument(
        "--timeout", type=float, default=1200.0, help="seconds for one answer of a program"
    )
    return parser.parse_args(argv)


def _probe(pipe: Any) -> None:
    try:
        device = measure.device(os.environ.get("BENCH_PEERS_DEVICE"))
        pipe.send((measure.platform_of(device), None))
    except BadInput as error:
        pipe.send((None, str(error)))


def choose_platform(name: str | None) -> str:
    """Asks a process of its own: one that has asked for GPUs keeps their memory. BadInput."""
    measure.choose_platform(name)
    if name == "cpu":
        return name
    os.environ |= {"BENCH_PEERS_DEVICE": name} if name else {}
    spawn = multiprocessing.get_context("spawn")
    pipe, child = spawn.Pipe()
    process = spawn.Process(target=_probe, args=(child,))
    process.start()
    found, problem = pipe.recv()
    process.join()
    if problem:
        raise BadInput(problem)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    measure.check_output(args.output)
    platform = choose_platform(args.device)
    setting = shapes.setting(
        args.size, platform, rows=args.batch, length=args.length, hardware=args.gin_file, changes=args.set
    )  # fmt: skip
    programs = []
    for name, dtype in PROGRAMS:
        if f"{name}:{dtype}" in args.programs or (name, dtype) == REFERENCE:
            spec = Spec(
                name, dtype, args.size, platform, setting.rows, setting.length,
                None if name == OURS else args.torch_microbatch,
                None if args.gin_file is None else tuple(args.gin_file), tuple(args.set),
            )  # fmt: skip
            programs.append(Program(spec, args.timeout))
    in_turns = platform == "cpu"
    compete(programs, args.rounds, args.round_seconds, in_turns)
    (reference,) = [program for program in programs if program.key == REFERENCE]
    goals = GOALS.get((args.size, platform), {})
    programs.sort(key=lambda program: (program.key != REFERENCE, program.spec.name != OURS))
    rows = [row(p, reference, goals.get(p.spec.dtype), in_turns) for p in programs]
    report = measure.circumstances(None) | {
        "device": platform, "device_kind": reference.device_kind or platform, "shape": str(setting), "size": args.size,
        "config": dataclasses.asdict(setting.config), "step_options": dataclasses.asdict(setting.step),
        "rounds": args.rounds, "in_turns": in_turns, "rows": rows,
    }  # fmt: skip
    measure.finish(args, report, table(report), rows)
    return 1 if any(program.is_wrong for program in programs) else 0


if __name__ == "__main__":
    measure.run(main)
