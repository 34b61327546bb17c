"""What BloomConfig.alibi_rounding changes: how far our logits and those of transformers are apart in bfloat16.

    python benchmarks/bench_alibi_rounding.py [--json FILE]

A BLOOM with random weights, numbers of bfloat16 all of them, is computed in bfloat16 by us with both roundings and by
transformers, and by transformers in float64 (softmax in float32). Then attention alone, of normal q, k and v.
Every line has as many tokens; only the length of the sequences differs. A distance is the root mean square of the
difference, divided by that of what is compared with.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for hf_reference

HEADS, HEAD_DIM, LAYERS, VOCAB, TOKENS = 16, 64, 4, 512, 2048
LENGTHS = (256, 512, 1024, 2048)
ROUNDINGS = ("exact", "bf16_hf")


def logits(length):
    """[B, L, V] of each program."""
    import hf_reference
    import jax
    import numpy as np
    import torch

    tokens = np.random.default_rng(0).integers(0, VOCAB, (TOKENS // length, length), np.int32)
    theirs = hf_reference.random_bloom(
        num_heads=HEADS, head_dim=HEAD_DIM, num_layers=LAYERS, vocab_size=VOCAB
    ).bfloat16()
    found = {"transformers": hf_reference.logits(theirs, tokens)}
    for rounding in ROUNDINGS:
        model, params = hf_reference.ours(theirs, alibi_rounding=rounding)

        @jax.jit
        def compute(params, model=model):
            x = model.apply({"params": params}, tokens)
            return model.apply({"params": params}, x, method="logits")

        found[rounding] = np.asarray(compute(params))
    found["float64"] = hf_reference.logits(theirs.to(torch.float64), tokens)
    return found


def contexts(length):
    """[B, L, H, K] of each program."""
    import hf_reference
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from bloomjax.attention import alibi_slopes, xla_attention

    draw = np.random.default_rng(0).standard_normal
    shape = (TOKENS // length, length, HEADS, HEAD_DIM)
    q, k, v, g = (jnp.asarray(draw(shape), jnp.bfloat16) for _ in range(4))
    valid = np.ones(shape[:2], bool)
    found = {
        "transformers": hf_reference.attention(q, k, v, g, valid, torch.bfloat16)[0],
        "float64": hf_reference.attention(q, k, v, g, valid, torch.float64)[0],
    }
    for rounding in ROUNDINGS:
        slopes = jnp.asarray(alibi_slopes(HEADS, rounding), jnp.float32)
        attend = jax.jit(xla_attention, static_argnames="rounding")
        found[rounding] = np.asarray(attend(q, k, v, slopes, rounding=rounding), np.float32)
    return found


def distances(found):
    import numpy as np
    from hf_reference import root_mean_square

    pairs = [(ours, "transformers") for ours in ROUNDINGS]
    pairs += [(program, "float64") for program in (*ROUNDINGS, "transformers")]
    report = {}
    for got, want in pairs:
        other = found[got].argmax(-1) != found[want].argmax(-1)
        report[f"{got} - {want}"] = {
            "distance": float(f"{root_mean_square(found[got], found[want]):.3g}"),
            "other_argmax_percent": round(100 * float(np.mean(other)), 1),
        }
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for what, compute in (("logits", logits), ("context of attention", contexts)):
        for length in LENGTHS:
            found = distances(compute(length))
            if what != "logits":  # an argmax of a context is nothing
                found = {pair: {"distance": d["distance"]} for pair, d in found.items()}
            rows.append({"of": what, "sequence_tokens": length, "differences": found})
    report = {
        "date": datetime.date.today().isoformat(), "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(),
        "python": platform.python_version(), "load_average": os.getloadavg()[0],
        "versions": {p: metadata.version(p) for p in ("jax", "flax", "torch", "transformers")},
        "shape": f"{LAYERS} layers, {HEADS} heads x {HEAD_DIM}, vocabulary {VOCAB}, {TOKENS} tokens, random weights",
        "results": rows,
    }  # fmt: skip
    print(f"{report['shape']}; {report['date']}")
    print(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(
        "Distance in bfloat16 (and where another token is the likeliest) of ours with each rounding:"
    )
    names = list(rows[0]["differences"])
    print(f"{'':22}{'tokens':>6}" + "".join(f"{name:>26}" for name in names))
    for row in rows:
        cells = [
            f"{d['distance']:.2g}"
            + (f" ({d['other_argmax_percent']}%)" if "other_argmax_percent" in d else "")
            for d in row["differences"].values()
        ]
        print(
            f"{row['of']:22}{row['sequence_tokens']:>6}" + "".join(f"{cell:>26}" for cell in cells)
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
