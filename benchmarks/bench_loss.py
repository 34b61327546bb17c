"""The loss layer: linear head and cross-entropy over a large vocabulary, with both gradients, against dense ones.

    python benchmarks/bench_loss.py [--rounds N] [--shape VOCABULARY,WIDTH,TOKENS ...] [--device gpu] [--output FILE]

Ours is `losses.linear_cross_entropy`; "dense" the same written down plainly in JAX, float32 logits of all tokens;
"torch" `linear`, then cross-entropy of float32 logits, as transformers' BloomForCausalLM trains: in bfloat16 weights,
logits and gradients of logits are bfloat16. All must agree with a float64 reference in numpy on a small case, and with
each other in the loss on the timed one, before anything is timed. Then ours meets each of the others in a duel of two
processes that take turns, so that other work on the machine hits both alike; the ratio is the median over the rounds.
On a CPU the ratios of CPU time and of the best rounds stand beside it: what a quiet machine would show.

Memory is measured in a process for each program: on a CPU its resident peak during the first run after compilation less
what was resident before; on a GPU torch's allocator's, and what the compiled program of the others asks for, since the
allocator's peak would be that of trying matrix products while compiling. All count the results, dx and dW (ours is
float32).
"""

import argparse
import ctypes
import importlib.util
import math
import multiprocessing
import os
import statistics
import time

import measure

from bloomjax.errors import BadInput

CPU_SHAPES = ((65_536, 512, 4096), (65_536, 1024, 4096), (250_880, 512, 2048))
GPU_SHAPES = tuple((250_880, width, 16_384) for width in (1024, 2048, 4096))  # 560m, 1b7, 7b1
# Ours, theirs, goal: how many times the seconds of ours theirs takes, and how many times the memory.
DUELS = (
    (("bloomjax", "bfloat16"), ("torch", "bfloat16"), (1.0, 5.0)),
    (("bloomjax", "bfloat16"), ("dense", "bfloat16"), (1.0, None)),
    (("bloomjax", "float32"), ("torch", "float32"), (None, None)),
)
SMALL = (1536, 48, 96)  # vocabulary, width, tokens of the check against float64
# Of loss, dx and dW: relative, of norms. Dense bfloat16 rounds its embedding as the others do.
TOLERANCES = {"float32": (1e-6, 1e-5, 1e-5), "bfloat16": (2e-3, 1e-2, 1e-2)}


def arrays(shape):
    """x [T, D], the embedding [V, D] of logits with standard deviation 2, both exact in bfloat16, and targets."""
    import ml_dtypes
    import numpy as np

    vocab, width, tokens = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, width), dtype=np.float32)
    w = rng.standard_normal((vocab, width), dtype=np.float32)
    w *= 2 * width**-0.5
    exact = [a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x, w)]
    return *exact, rng.integers(0, vocab, tokens)


def torch_program(dtype, shape, device):
    """step() -> loss, dx, dW, when all is done."""
    import torch

    x, w, targets = (torch.from_numpy(a) for a in arrays(shape))
    place = "cuda" if device == "gpu" else "cpu"
    x, w = (a.to(place, getattr(torch, dtype)).requires_grad_() for a in (x, w))
    targets = targets.to(place)

    def run(x, w, targets):
        x.grad = w.grad = None
        logits = torch.nn.functional.linear(x, w)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        return loss.item()  # waits

    def step():
        loss = run(x, w, targets)
        if device == "gpu":
            torch.cuda.synchronize()
        dx, dw = x.grad, w.grad
        assert dx is not None and dw is not None
        return loss, lambda: dx.float().cpu().numpy(), lambda: dw.float().cpu().numpy()

    # So that threads and libraries are there before memory is looked at.
    run(*(a[:8].detach().clone().requires_grad_() for a in (x, w)), targets[:8] % 8)
    return step


def jax_program(name, dtype, shape):
    """The same of ours and of a dense loss; both take float32 weights, as they are trained, and cast them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bloomjax.losses import linear_cross_entropy

    if dtype == "float32":  # as torch's are; by default a GPU's are of TF32
        jax.config.update("jax_default_matmul_precision", "highest")
    x, w, targets = arrays(shape)
    inputs = (
        jnp.asarray(x, dtype)[None],
        jnp.asarray(w),
        jnp.asarray(targets, jnp.int32)[None],
        jnp.full((1, len(x)), 1 / len(x), jnp.float32),
    )

    def ours(x, w, targets, weights):
        return linear_cross_entropy(x, w, targets, weights)[0]

    def dense(x, w, targets, weights):
        logits = jnp.einsum("bld,vd->blv", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
        gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - gold))

    function = jax.value_and_grad({"bloomjax": ours, "dense": dense}[name], (0, 1))
    compiled = jax.jit(function).lower(*inputs).compile()

    def step():
        loss, (dx, dw) = jax.block_until_ready(compiled(*inputs))
        return float(loss), lambda: np.asarray(dx[0], np.float32), lambda: np.asarray(dw)

    return step, compiled


def program(kind, shape, device):
    """step, and what it runs if that is compiled."""
    name, dtype = kind
    if name == "torch":
        return torch_program(dtype, shape, device), None
    return jax_program(name, dtype, shape)


# ---- what a process of its own does ----


def errors(pipe, kind, device):
    """Of loss, dx and dW on a small case: relative, of norms, to float64."""
    import numpy as np

    x, w, targets = arrays(SMALL)
    x, w, rows = x.astype(np.float64), w.astype(np.float64), np.arange(len(x))
    logits = x @ w.T
    top = logits.max(1, keepdims=True)
    p = np.exp(logits - top)
    lse = top[:, 0] + np.log(p.sum(1))
    loss = np.mean(lse - logits[rows, targets])
    p /= p.sum(1, keepdims=True)
    p[rows, targets] -= 1
    p /= len(x)
    step, _ = program(kind, SMALL, device)
    got_loss, got_dx, got_dw = step()
    pipe.send([
        float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        for got, wanted in ((got_loss, loss), (got_dx(), p @ w), (got_dw(), p.T @ x))
    ])  # fmt: skip


def peak(pipe, kind, shape, device):
    """Bytes of the first run beyond what was there before."""
    step, compiled = program(kind, shape, device)
    if device == "cpu":
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what was freed is no part of what is there
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts from here
        step()
        pipe.send(resident("VmHWM") - before)
    elif kind[0] == "torch":
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        pipe.send(torch.cuda.max_memory_allocated() - before)
    else:
        stats = compiled.memory_analysis()
        pipe.send(stats.temp_size_in_bytes + stats.output_size_in_bytes)


def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def serve(pipe, kind, shape, device):
    from bloomjax.startup import keep_freed_memory

    if kind[0] != "torch":
        keep_freed_memory()  # as `train` does; before JAX has threads
    step, _ = program(kind, shape, device)
    while pipe.recv():  # False ends it
        wall, cpu = time.perf_counter(), time.process_time()
        loss, *_ = step()
        pipe.send((loss, time.perf_counter() - wall, time.process_time() - cpu))


# ---- the parent ----


def ask(target, *args):
    """What one process sends."""
    pipe, child = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(child, *args))
    process.start()
    child.close()
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"{target.__name__} of {args[0]} ended without a result") from None
    finally:
        process.join()


def duel(kinds, shape, device, rounds):
    """(loss, wall seconds, CPU seconds) of each kind, for each round."""
    pipes = {}
    for kind in kinds:
        pipes[kind], child = SPAWN.Pipe()
        SPAWN.Process(target=serve, args=(child, kind, shape, device), daemon=True).start()
        child.close()

    def step(kind):
        pipes[kind].send(True)
        try:
            return pipes[kind].recv()
        except EOFError:
            raise SystemExit(f"{kind} at {shape} ended without a result") from None

    for _ in range(2):  # the first touches memory
        losses = [step(kind)[0] for kind in kinds]
    if not abs(losses[0] - losses[1]) <= TOLERANCES[kinds[1][1]][0] * losses[1]:
        raise SystemExit(f"{kinds} at {shape} compute the losses {losses}")
    found = [[step(kind) for kind in kinds] for _ in range(rounds)]
    for pipe in pipes.values():
        pipe.send(False)
    return found


def available_bytes():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def measure_shape(shape, device, rounds, duels):
    """A row for each duel; one that needs more memory than there is says so."""
    vocab, width, tokens = shape
    peaks = {}
    for ours, theirs, goals in duels:
        size = 4 if theirs[1] == "float32" else 2
        # Logits and their gradient in their dtype, float32 logits, log softmax and gradient; weights twice; ours.
        needed = vocab * (tokens * (2 * size + 12) + width * (2 * size + 16)) + 2 * 10**9
        row = {
            "vocab": vocab, "width": width, "tokens": tokens, "dtype": ours[1], "against": theirs[0], "goals": goals,
        }  # fmt: skip
        if device == "cpu" and needed > available_bytes():
            free = f"{available_bytes() / 1e9:.1f} GB are free"
            yield row | {"not_measured": f"needs {needed / 1e9:.1f} GB, {free}"}
            continue
        for kind in (ours, theirs):
            if kind not in peaks:
                peaks[kind] = ask(peak, kind, shape, device)
        found = duel((ours, theirs), shape, device, rounds)
        walls, cpus = ([[r[i][j] for r in found] for i in (0, 1)] for j in (1, 2))
        ratio = lambda a: statistics.median(t / o for o, t in zip(*a, strict=True))  # noqa: E731
        best = min(walls[0])
        yield row | {
            "loss": round(found[-1][0][0], 6), "wall_seconds": [round(statistics.median(w), 4) for w in walls],
            "cpu_seconds": [round(statistics.median(c), 4) for c in cpus],
            "tokens_per_second": round(tokens / statistics.median(walls[0])),
            "best_gflops_per_second": round(6 * math.prod(shape) / best / 1e9),
            "times_wall": round(ratio(walls), 2), "times_cpu": round(ratio(cpus), 2),
            "best_times_wall": round(min(walls[1]) / best, 2), "best_times_cpu": round(min(cpus[1]) / min(cpus[0]), 2),
            "peak_gb": [round(peaks[kind] / 1e9, 3) for kind in (ours, theirs)],
            "times_memory": round(peaks[theirs] / peaks[ours], 1),
        }  # fmt: skip


def text(row):
    place = (
        f"{row['vocab']:>8,}{row['width']:6}{row['tokens']:7}  {row['dtype']:9} {row['against']:6}"
    )
    if "not_measured" in row:
        return f"{place} not measured: {row['not_measured']}"
    what = zip(row["goals"], ("time", "memory"), strict=True)
    goals = "  ".join(f"{goal:g}x {name}" for goal, name in what if goal)
    times = "".join(
        f"{row[k]:7.2f}" for k in ("times_cpu", "times_wall", "best_times_cpu", "best_times_wall")
    )
    peaks = "{:8.2f}{:8.2f}".format(*row["peak_gb"])
    return (
        f"{place}{row['wall_seconds'][0]:8.3f}{row['best_gflops_per_second']:8,}{times}{peaks}"
        f"{row['times_memory']:7.1f}  {goals}"
    )


HEADINGS = (
    "                                 ours, best        theirs / ours: best     best   peak GB   times\n"
    "   vocab width tokens  dtype   against  wall s GFLOP/s   CPU   wall    CPU   wall    ours  theirs memory goals"
)


def table(report):
    lines = [measure.headline(report)]
    for kind, found in report["errors_to_float64"].items():
        errors = ", ".join(f"{e:.0e}" for e in found)
        lines.append(f"{kind:18} relative errors of loss, dx, dW: {errors}")
    return "\n".join([*lines, HEADINGS, *map(text, report["rows"])])


def numbers(text):
    """--shape's."""
    found = tuple(int(number) for number in text.split(",") if number.isdigit())
    if len(found) != 3 or min(found) < 1 or text.count(",") != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no VOCABULARY,WIDTH,TOKENS")
    return found


def check(kind, device):
    """Errors on a small case. BadInput if it is wrong; NaN is."""
    found, allowed = ask(errors, kind, device), TOLERANCES[kind[1]]
    if not all(a <= b for a, b in zip(found, allowed, strict=True)):
        raise BadInput(
            f"{' '.join(kind)} is wrong: errors {found} of loss, dx, dW, allowed {allowed}; nothing was timed"
        )
    return found


def main(argv=None):
    parser = measure.Parser(__doc__)
    parser.add_argument("--rounds", type=measure.whole_number, default=7)
    parser.add_argument("--shape", type=numbers, action="append", help="VOCABULARY,WIDTH,TOKENS")
    args = parser.parse_args(argv)
    device = args.device or "cpu"
    if device == "tpu":
        parser.error("--device=tpu: torch has none to compare with; cpu or gpu")
    measure.choose_platform(device)
    measure.check_output(args.output)
    # The processes of a duel share the device.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    has_torch = importlib.util.find_spec("torch") is not None
    duels = [duel for duel in DUELS if has_torch or duel[1][0] != "torch"]
    kinds = dict.fromkeys(kind for ours, theirs, _ in duels for kind in (ours, theirs))
    checked = {kind: check(kind, device) for kind in kinds}
    report = measure.circumstances(None) | {
        "device": device, "rounds": args.rounds, "rows": [],
        "errors_to_float64": {" ".join(kind): found for kind, found in checked.items()},
    }  # fmt: skip
    if not has_torch:
        measure.say("torch is not installed: without it")
    for shape in args.shape or (GPU_SHAPES if device == "gpu" else CPU_SHAPES):
        for row in measure_shape(shape, device, args.rounds, duels):
            report["rows"].append(row)
            measure.say(text(row))
    measure.finish(args, report, table(report))


SPAWN = multiprocessing.get_context("spawn")

if __name__ == "__main__":
    measure.run(main)
