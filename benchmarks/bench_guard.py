"""What guard, comparison of copies and search for stragglers add to a training step.

    python benchmarks/bench_guard.py [--target cpu:8 ...] [--rounds N] [--json FILE]

Compiled: FLOPs and bytes of the step of 1b7.gin as the target's compiler counts them (a TPU needs libtpu, not a TPU),
on a mesh of data x 1 x 1, where all is copied, and with one row a device: the shortest step there is, so that the share
is the largest. Compilers count the body of a loop once; so the layers are not looped over, 2 and 3 of them are
compiled, and what the third adds is added for the others. What is done every 100 steps counts for a hundredth.

Measured: steps of tiny.gin on this CPU, one with and one without in turns, the second of each pair first every other
time. The ratio is the median over pairs, plus what the steps that compare and report take longer, for a hundredth.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

SEQUENCE_LENGTH, EVERY_STEPS, NUM_LAYERS = 2048, 100, (2, 3)
GOALS = {"compiled": 0.01, "measured": 0.02}


# ---- the compiled program, in a process with the target's environment ----


def compiled(target_name):
    """{"step", "guard", "replicas", "probe"}: FLOPs and bytes of one device in a step, of all layers."""
    import jax

    from bloomjax import config, targets
    from bloomjax.partitioning import MeshShape

    target = targets.parse(target_name)
    if problem := target.missing():
        raise SystemExit(problem)
    mesh = MeshShape(-1, 1, 1).build(target.devices())
    model = config.build("train.model", "1b7.gin")
    optimizer = config.build("train.optimizer", "1b7.gin")
    few, more = (costs_with(model, optimizer, mesh, num) for num in NUM_LAYERS)
    num_layers = model.config.num_layers
    found = {}
    for part in few:
        found[part] = {
            what: few[part][what]
            + (num_layers - NUM_LAYERS[0]) * (more[part][what] - few[part][what])
            for what in few[part]
        }
    found["guard"] = {what: found["guarded"][what] - found["step"][what] for what in found["step"]}
    found["replicas"] = {what: x / EVERY_STEPS for what, x in found["replicas"].items()}
    found["probe"] = probe_costs(None if target.platform == "cpu" else 4096)
    return {"target": target.name, "jax": jax.__version__, "mesh": dict(mesh.shape), "costs": found}


def costs_with(model, optimizer, mesh, num_layers):
    import dataclasses

    import jax
    import jax.numpy as jnp

    from bloomjax.drift import ReplicaCheck
    from bloomjax.model import Bloom
    from bloomjax.train_state import abstract_state
    from bloomjax.train_step import StepOptions, abstract_batch, jit_programs

    changed = dataclasses.replace(
        model.config, num_layers=num_layers, scan_layers=False, expected_params=None
    )
    model = Bloom(changed)
    state = abstract_state(model, optimizer, mesh)
    options = StepOptions(loss_chunk_tokens=SEQUENCE_LENGTH)  # one chunk: no loop
    step = jit_programs(model, optimizer, options, mesh, state)[2]
    arguments = [
        state, abstract_batch(mesh.size, SEQUENCE_LENGTH, mesh), jax.ShapeDtypeStruct((), jnp.float32),
        jax.eval_shape(lambda: jax.random.key(0)),
    ]  # fmt: skip
    limits = jax.ShapeDtypeStruct((2,), jnp.float32)
    with jax.set_mesh(mesh):
        plain = step.lower(*arguments).compile()
        guarded = step.lower(*arguments, limits).compile()
    check = ReplicaCheck(every_steps=EVERY_STEPS)
    check.prepare(state)
    return {"step": costs(plain), "guarded": costs(guarded), "replicas": costs(check._program)}


def costs(executable):
    found = executable.cost_analysis()
    found = found[0] if isinstance(found, list) else found
    temporary = executable.memory_analysis().temp_size_in_bytes
    return {
        "flops": found["flops"], "bytes": found["bytes accessed"], "temporary_bytes": temporary,
    }  # fmt: skip


def probe_costs(size):
    """By Stragglers' own limit its time is at most 0.2 % of that of the steps between; this is what it computes."""
    from bloomjax import stragglers

    num, size = (stragglers._CHAIN_LENGTH, size) if size else (1, stragglers._CPU_PROBE_SIZE)
    times = (1 + stragglers._PROBE_REPEATS) * num / EVERY_STEPS
    return {"flops": times * 2 * size**3, "bytes": times * 3 * 2 * size**2, "temporary_bytes": 0}


# ---- measured, in a process with so many virtual devices ----


def measured(num_devices, rounds):
    from bloomjax.startup import keep_freed_memory

    keep_freed_memory()  # as tiny.gin does
    import jax
    import numpy as np

    from bloomjax import config
    from bloomjax.drift import ReplicaCheck
    from bloomjax.guard import SpikeGuard
    from bloomjax.partitioning import MeshShape
    from bloomjax.stragglers import Stragglers
    from bloomjax.train_state import abstract_state
    from bloomjax.train_step import StepOptions, abstract_batch, jit_programs

    model = config.build("train.model", "tiny.gin")
    optimizer = config.build("train.optimizer", "tiny.gin")
    mesh = MeshShape(-1, 1, 1).build()
    assert mesh.size == num_devices
    abstract = abstract_state(model, optimizer, mesh)
    init, _, train_step, _ = jit_programs(model, optimizer, StepOptions(), mesh, abstract)
    rng, key, rate = np.random.default_rng(0), jax.random.key(0), np.float32(1e-3)
    batch = abstract_batch(32, 64, mesh)
    values = {
        "tokens": rng.integers(0, 4096, (32, 65), np.int32),
        "weights": np.ones(32, np.float32),
    }
    batch = {name: jax.device_put(values[name], x.sharding) for name, x in batch.items()}
    guard, stragglers = SpikeGuard(), Stragglers(every_steps=EVERY_STEPS)
    replicas = ReplicaCheck(every_steps=EVERY_STEPS)
    replicas.prepare(abstract)
    states = {"without": init(0), "with": init(0)}

    def without(step):
        del step
        states["without"], metrics = train_step(states["without"], batch, rate, key)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    def guarded(step):
        started = time.monotonic()
        limits = guard.limits(step)
        states["with"], metrics = train_step(states["with"], batch, rate, key, limits)
        stragglers.host_step(time.monotonic() - started)
        if replicas.is_due(step):
            assert replicas.differences(states["with"]) == []
        stragglers.report(step)
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        assert guard.judge(step, loss, norm, bool(metrics["is_taken"])) is None
        return loss, norm

    programs = {"without": without, "with": guarded}
    spent = {name: [] for name in programs}  # wall and CPU seconds of each step
    with jax.set_mesh(mesh):
        for step in range(1, rounds + 1):
            losses = {}
            for name in sorted(programs, reverse=bool(step % 2)):
                wall, cpu = time.perf_counter(), time.process_time()
                losses[name] = programs[name](step)
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            assert losses["with"] == losses["without"], (step, losses)  # the same bits
    found = {"num_devices": num_devices, "num_pairs": rounds}
    for which, clock in enumerate(("wall", "cpu")):
        found[clock] = summary(*([each[which] for each in spent[name]] for name in programs))
    return found


def summary(without, guarded):
    """Shares of the median step. `of_eighths`: of every eighth pair alone, what chance makes of it."""
    first = 40  # compilation, and the steps before the guard has limits
    pairs = list(enumerate(zip(guarded, without, strict=True), 1))
    due = [a - b for n, (a, b) in pairs if n % EVERY_STEPS == 0]
    usual = [(a, b) for n, (a, b) in pairs if n % EVERY_STEPS and n > first]
    step_seconds = statistics.median(b for _, b in usual)
    share = statistics.median(a / b for a, b in usual) - 1
    parts = [statistics.median(a / b for a, b in usual[n::8]) - 1 for n in range(8)]
    due_share = (statistics.median(due) / step_seconds - share) / EVERY_STEPS
    return {
        "step_seconds": round(step_seconds, 5), "every_step_share": round(share, 4),
        "of_eighths": [round(x, 4) for x in sorted(parts)], "due_share": round(due_share, 5),
        "share": round(share + due_share, 4),
    }  # fmt: skip


# ---- all of it ----


def in_a_process(environment, *arguments):
    result = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def print_compiled(found):
    step = found["costs"]["step"]
    print(
        f"{found['target']}: 1b7, {SEQUENCE_LENGTH} tokens a device and step: {step['flops']:.4g} FLOPs, "
        f"{step['bytes']:.4g} bytes, {step['temporary_bytes'] / 1e9:.2f} GB of temporaries"
    )
    print(f"  {'':10}{'FLOPs':>12}{'share':>10}{'bytes':>12}{'share':>10}{'temporaries GB':>16}")
    for part in ("guard", "replicas", "probe"):
        cost = found["costs"][part]
        print(
            f"  {part:10}{cost['flops']:12.3g}{cost['flops'] / step['flops']:10.4%}{cost['bytes']:12.3g}"
            f"{cost['bytes'] / step['bytes']:10.4%}{cost['temporary_bytes'] / 1e9:16.3f}"
        )
    for what, share in found["shares"].items():
        print(f"  all: {share:.3%} of the {what} (goal < {GOALS['compiled']:.0%})")


def print_measured(found):
    for clock in ("wall", "cpu"):
        times = found[clock]
        low, high = times["of_eighths"][0], times["of_eighths"][-1]
        print(
            f"tiny.gin on {found['num_devices']} virtual devices, {found['num_pairs']} pairs, {clock:4} time: step "
            f"{1e3 * times['step_seconds']:.1f} ms; each step {times['every_step_share']:+.2%} (eighths of the pairs: "
            f"{low:+.2%} to {high:+.2%}), for every {EVERY_STEPS}th {times['due_share']:+.2%}; all "
            f"{times['share']:+.2%} (goal < {GOALS['measured']:.0%})"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="*", default=["cpu:8"])
    parser.add_argument("--rounds", type=int, default=440)
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json")
    parser.add_argument("--only", choices=("compiled", "measured"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        found = (
            compiled(args.target[0])
            if args.only == "compiled"
            else measured(args.devices[0], args.rounds)
        )
        print(json.dumps(found))
        return

    from bloomjax import targets

    report = {
        "date": datetime.date.today().isoformat(), "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(), "python": platform.python_version(), "load_average": os.getloadavg()[0],
        "versions": {p: metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax")},
        "sequence_length_tokens": SEQUENCE_LENGTH, "every_steps": EVERY_STEPS, "goals": GOALS,
        "compiled": [], "measured": [],
    }  # fmt: skip
    for name in args.target:
        environment = targets.parse(name).environment()
        found = in_a_process(environment, "--only", "compiled", "--target", name)
        step, parts = found["costs"]["step"], ("guard", "replicas", "probe")
        found["shares"] = {
            what: sum(found["costs"][part][what] for part in parts) / step[what]
            for what in ("flops", "bytes")
        }
        report["compiled"].append(found)
        print_compiled(found)
    for num_devices in args.devices:
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        found = in_a_process(
            {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            "--only", "measured", "--devices", num_devices, "--rounds", args.rounds,
        )  # fmt: skip
        report["measured"].append(found)
        print_measured(found)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
