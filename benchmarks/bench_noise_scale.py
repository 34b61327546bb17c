"""What the noise scale costs a step: tiny.gin's step of several microbatches with the norm of the first one, and
without.

    python benchmarks/bench_noise_scale.py [--rounds 40] [--microbatches 2,8] [--length 64] [--json] [--output FILE]

Both programs take turns in one process; the ratio is of the process's CPU time, median of rounds. `bytes` is what one
pass over the gradient reads, as a share of what the compiled step without it reads and writes.
"""

import statistics
import time

import measure


def program(num_microbatches, length, with_norm):
    """The compiled train step of tiny.gin, its state, and what it takes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bloomjax import config, gradients
    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import abstract_state
    from bloomjax.train_step import StepOptions, abstract_batch, jit_programs

    model = config.build("train.model", "tiny.gin")
    optimizer = config.build("train.optimizer", "tiny.gin")
    mesh = MeshShape(1, 1, 1).build(jax.devices()[:1])
    options = StepOptions(microbatch_size_samples=32 // num_microbatches)
    state = abstract_state(model, optimizer, mesh)
    init, _, step, _ = jit_programs(model, optimizer, options, mesh, state)
    key, rate = jax.random.key(0), np.float32(1e-3)
    norm = gradients._norm
    if not with_norm:
        gradients._norm = lambda refs: jnp.zeros(())
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(state, abstract_batch(32, length, mesh), rate, key).compile()
    finally:
        gradients._norm = norm
    tokens = np.random.default_rng(0).integers(0, 4096, (32, length + 1), np.int32)
    batch = jax.device_put({"tokens": tokens, "weights": np.ones(32, np.float32)})
    held = [init(0)]

    def run():
        started = time.process_time()
        held[0], metrics = compiled(held[0], batch, rate, key)
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        return time.process_time() - started, (loss, grad_norm), float(metrics["part_norm"])

    return compiled, run


def costs(num_microbatches, length, rounds):
    compiled, with_norm = program(num_microbatches, length, True)
    plain_compiled, plain = program(num_microbatches, length, False)
    # Right before it is timed: the same steps to the bit, and only one of them has a norm.
    for _ in range(3):
        (_, ours, norm), (_, theirs, none) = with_norm(), plain()
        assert ours == theirs and norm > 0 and none == 0, (ours, theirs, norm, none)
    times = [(with_norm()[0], plain()[0]) for _ in range(rounds)]
    found, without = (statistics.median(t) for t in zip(*times, strict=True))
    flops = [c.cost_analysis()["flops"] for c in (compiled, plain_compiled)]
    read = [c.cost_analysis()["bytes accessed"] for c in (compiled, plain_compiled)]
    return {
        "length": length, "microbatches": num_microbatches, "cpu_seconds": found, "cpu_seconds_without": without,
        "ratio": statistics.median(a / b for a, b in times), "flops_ratio": flops[0] / flops[1],
        "bytes_ratio": read[0] / read[1],
    }  # fmt: skip


def main():
    parser = measure.Parser(__doc__)
    parser.add_argument("--rounds", type=measure.whole_number, default=40)
    parser.add_argument("--microbatches", default="2,8")
    parser.add_argument("--length", type=measure.whole_number, default=64, help="tokens of a row")
    args = parser.parse_args()
    measure.check_output(args.output)
    measure.choose_platform(args.device)
    from bloomjax import startup

    startup.keep_freed_memory()  # as tiny.gin does
    rows = [costs(int(number), args.length, args.rounds) for number in args.microbatches.split(",")]
    circumstances = measure.circumstances(measure.device(args.device))
    names = ("length", "microbatches", "ratio", "flops_ratio", "bytes_ratio")
    cells = [
        [row[name] if name in names[:2] else f"{row[name]:.4f}" for name in names] for row in rows
    ]
    table = f"{measure.headline(circumstances)}\nwith the norm / without it\n{measure.columns(names, cells)}"
    measure.finish(args, circumstances | {"rows": rows}, table, rows)


if __name__ == "__main__":
    measure.run(main)
