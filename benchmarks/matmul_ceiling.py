"""How fast this device multiplies matrices of the widths of a model: the ceiling of a training step.

    python benchmarks/matmul_ceiling.py [--size 560m ...] [--tokens N] [--json] [--output FILE]

bfloat16 operands with normal numbers, float32 sums. Each weight of a model takes part in three products: with its
input, with its output's gradient, and its own gradient. `ceiling` is the rate at which all of a step's products with
weights would run, each at its measured rate; attention's are not in it.
"""

import functools
from typing import Any, NamedTuple

import measure
import shapes

from bloomjax import flops
from bloomjax.loss_chunks import chunk_tokens_for


class Product(NamedTuple):
    """[m, k] x [k, n], and how many of them a step has; a part of one counts as a part."""

    name: str
    m: int
    k: int
    n: int
    times: float

    @property
    def flops(self) -> float:
        """Of one."""
        return 2.0 * self.m * self.k * self.n


def products(setting: shapes.Setting) -> list[Product]:
    """Those of a step of `setting` with weights, forward and backward; rows of one microbatch at a time."""
    c, step = setting.config, setting.step
    D, F, V = c.emb_dim, c.mlp_width, c.vocab_size
    rows = min(setting.rows, step.microbatch_size_samples or setting.rows)
    tokens = rows * setting.length
    chunk = step.loss_chunk_tokens or chunk_tokens_for(tokens, V, D, platform="cuda")
    found = []
    for name, num_tokens, k, n, num in (
        ("qkv", tokens, D, 3 * D, c.num_layers),
        ("out", tokens, D, D, c.num_layers),
        ("mlp_in", tokens, D, F, c.num_layers),
        ("mlp_out", tokens, F, D, c.num_layers),
        ("head", chunk, D, V, 1),
    ):
        times = num * setting.tokens / num_tokens
        for part, shape in (
            ("", (num_tokens, k, n)), ("'s dx", (num_tokens, n, k)), ("'s dw", (k, num_tokens, n)),
        ):  # fmt: skip
            found.append(Product(name + part, *shape, times))
    return found


@functools.cache
def rate(m: int, k: int, n: int, device: Any, num_rounds: int) -> float:
    """FLOP/s of one product, the median of `num_rounds`."""
    import jax
    import jax.numpy as jnp

    def multiply(a, b):
        if device.platform == "cpu":  # where a bfloat16 result is made of float32 operands
            return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)
        return a @ b

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    with jax.default_device(device):
        # Seeds are arguments, else XLA would compute the constants while it compiles.
        a, b = jax.jit(lambda s, t: (normal(s, m, k), normal(t, k, n)))(0, 1)
        multiply = jax.jit(multiply)
        jax.block_until_ready(multiply(a, b))
        (times,) = measure.time_in_turns([lambda: multiply(a, b)], num_rounds)
    return 2.0 * m * k * n / times.median


def ceiling(setting: shapes.Setting, device: Any, num_rounds: int = 7) -> dict[str, Any]:
    """{"tflops": of all products together, "products": [{name, m, k, n, tflops, share_of_flops}, ...]}."""
    found = products(setting)
    rates = [rate(p.m, p.k, p.n, device, num_rounds) for p in found]
    total = sum(p.flops * p.times for p in found)
    seconds = sum(p.flops * p.times / r for p, r in zip(found, rates, strict=True))
    rows = [
        {"name": p.name, "m": p.m, "k": p.k, "n": p.n, "tflops": r / 1e12,
         "share_of_flops": p.flops * p.times / total}
        for p, r in zip(found, rates, strict=True)
    ]  # fmt: skip
    return {"tflops": total / seconds / 1e12, "products": rows}


def main(argv: list[str] | None = None) -> int:
    parser = measure.Parser(__doc__)
    parser.add_argument("--size", nargs="+", default=["small"], help=", ".join(shapes.SIZES))
    parser.add_argument("--batch", type=measure.whole_number, help="rows")
    parser.add_argument("--length", type=measure.whole_number, help="tokens of a row")
    parser.add_argument("--rounds", type=measure.whole_number, default=7)
    args = parser.parse_args(argv)
    measure.choose_platform(args.device)
    measure.check_output(args.output)
    device = measure.device(args.device)
    platform = measure.platform_of(device)
    settings = [
        shapes.setting(size, platform, rows=args.batch, length=args.length) for size in args.size
    ]
    report = measure.circumstances(device) | {"sizes": []}
    peak = flops.peak_flops_per_second(device.device_kind)
    rows = []
    for setting in settings:
        found = ceiling(setting, device, args.rounds)
        report["sizes"].append({"size": setting.size, "shape": str(setting)} | found)
        for each in [*found["products"], {"name": "ceiling", "tflops": found["tflops"]}]:
            share = each["tflops"] * 1e12 / peak if peak else "no peak known"
            shape = [each.get(x) for x in "mkn"]
            rows.append([setting.size, each["name"], *shape, each["tflops"], share])
    names = ["size", "product", "m", "k", "n", "TFLOP/s", "of peak"]
    measure.finish(args, report, measure.headline(report) + "\n" + measure.columns(names, rows))
    return 0


if __name__ == "__main__":
    measure.run(main)
