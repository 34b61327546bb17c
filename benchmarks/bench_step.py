"""A training step of a small BLOOM on the CPU: bloomjax against transformers + torch.optim.AdamW.

    python benchmarks/bench_step.py [--rounds N] [--json FILE]

Both start from the same weights, and must compute the same loss before anything is timed. Each program lives in a
process of its own; they take turns, one step each, and the ratio is the median over the rounds, so that other work on
the machine hits both alike. CPU time is that of all threads; torch's wait by spinning, which a busy machine makes dear.
So the table has the ratio of the best rounds, too: what a quiet machine would show.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from importlib import metadata

VOCAB, LAYERS, DIM, HEADS, ROWS, LENGTH = 16_384, 4, 512, 8, 4, 512
RATE = 1e-3
OURS = ("bfloat16", "float32")
THEIRS = ("float32", "autocast-bfloat16", "bfloat16")
GOALS = {
    "float32": 2.0,
    "autocast-bfloat16": 2.0,
    "bfloat16": 1.0,
}  # torch dtype: ratio to our bfloat16


def batch():
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)


def torch_model():
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=DIM, n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0,
        use_cache=False,
    )  # fmt: skip
    return BloomForCausalLM(config).train()


def torch_program(dtype):
    """Returns (step, loss before the first update); step() gives a loss."""
    import torch

    model, tokens = torch_model(), torch.from_numpy(batch()).long()
    if dtype == "bfloat16":
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast-bfloat16"):
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_params():
    """The weights of torch_model() in our names; its QKV rows are [head, qkv, head_dim], ours [qkv, head, head_dim]."""
    import numpy as np

    torch = {
        name: value.detach().numpy() for name, value in torch_model().transformer.named_parameters()
    }
    head_dim = DIM // HEADS

    def layers(name, change):
        return np.stack([change(torch[f"h.{i}.{name}"]) for i in range(LAYERS)])

    def norm(name):
        return {
            "scale": layers(f"{name}.weight", lambda a: a),
            "bias": layers(f"{name}.bias", lambda a: a),
        }

    def linear(name, kernel, bias=lambda a: a):
        return {"kernel": layers(f"{name}.weight", kernel), "bias": layers(f"{name}.bias", bias)}

    return {
        "embedding": torch["word_embeddings.weight"],
        "embedding_norm": {
            "scale": torch["word_embeddings_layernorm.weight"], "bias": torch["word_embeddings_layernorm.bias"],
        },
        "final_norm": {"scale": torch["ln_f.weight"], "bias": torch["ln_f.bias"]},
        "layers": {
            "attention_norm": norm("input_layernorm"),
            "mlp_norm": norm("post_attention_layernorm"),
            "qkv": linear(
                "self_attention.query_key_value",
                lambda a: a.reshape(HEADS, 3, head_dim, DIM).transpose(3, 1, 0, 2),
                lambda a: a.reshape(HEADS, 3, head_dim).transpose(1, 0, 2),
            ),
            "out": linear("self_attention.dense", lambda a: a.T.reshape(HEADS, head_dim, DIM)),
            "mlp_in": linear("mlp.dense_h_to_4h", lambda a: a.T),
            "mlp_out": linear("mlp.dense_4h_to_h", lambda a: a.T),
        },
    }  # fmt: skip


def our_program(dtype):
    from bloomjax.train import keep_freed_memory

    keep_freed_memory()  # as tiny.gin does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bloomjax.model import Bloom, BloomConfig
    from bloomjax.optimizer import adamw
    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import TrainState, abstract_state
    from bloomjax.train_step import StepOptions, make_train_step

    shape = dict(vocab_size=VOCAB, num_layers=LAYERS, emb_dim=DIM, num_heads=HEADS)
    model = Bloom(BloomConfig(**shape, dtype=dtype, scan_layers=False))
    optimizer, mesh = adamw(b1=0.9, b2=0.95, weight_decay=0.1), MeshShape().build()
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
    params = jax.tree.map(jnp.asarray, our_params())
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    state = jax.device_put(state, shardings)
    data = {"tokens": jnp.asarray(batch()), "weights": jnp.ones(ROWS)}
    train_step = jax.jit(
        make_train_step(model, optimizer, StepOptions(), mesh), donate_argnums=0,
        out_shardings=(shardings, None),
    )  # fmt: skip
    key = jax.random.key(0)

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, data, np.float32(RATE), key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def serve(pipe, ours, dtype):
    step = (our_program if ours else torch_program)(dtype)
    while pipe.recv():  # False ends it
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        pipe.send((loss, time.perf_counter() - wall, time.process_time() - cpu))


def stop(pipes):
    for pipe in pipes.values():
        pipe.send(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    names = [(True, dtype) for dtype in OURS] + [(False, dtype) for dtype in THEIRS]
    pipes = {}
    for name in names:
        pipes[name], child = spawn.Pipe()
        spawn.Process(target=serve, args=(child, *name)).start()

    def step(name):
        pipes[name].send(True)
        return pipes[name].recv()

    losses = {name: step(name)[0] for name in names}  # of the given weights; compiles, too
    exact = losses[False, "float32"]
    for name, loss in losses.items():
        tolerance = 1e-5 if name[1] == "float32" else 3e-3
        if abs(loss - exact) > tolerance * exact:
            stop(pipes)
            raise SystemExit(f"{name} computes the loss {loss:.6f}, torch in float32 {exact:.6f}")
    for _ in range(2):
        after = {name: step(name)[0] for name in names}
    rounds = [{name: step(name)[1:] for name in names} for _ in range(args.rounds)]
    stop(pipes)

    reference = (True, "bfloat16")
    rows = []
    for name in names:
        wall, cpu = (statistics.median(r[name][i] for r in rounds) for i in (0, 1))
        ratio_wall, ratio_cpu = (
            statistics.median(r[name][i] / r[reference][i] for r in rounds) for i in (0, 1)
        )
        best_wall, best_cpu = (
            min(r[name][i] for r in rounds) / min(r[reference][i] for r in rounds) for i in (0, 1)
        )
        rows.append({
            "name": "bloomjax" if name[0] else "transformers", "dtype": name[1], "loss": round(losses[name], 5),
            "loss_after_2_steps": round(after[name], 5), "wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3),
            "tokens_per_second": round(ROWS * LENGTH / wall), "times_cpu": round(ratio_cpu, 2),
            "times_wall": round(ratio_wall, 2), "best_times_cpu": round(best_cpu, 2),
            "best_times_wall": round(best_wall, 2), "goal": None if name[0] else GOALS[name[1]],
        })  # fmt: skip
    report = {
        "date": datetime.date.today().isoformat(), "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(),
        "python": platform.python_version(), "rounds": args.rounds, "load_average": os.getloadavg()[0],
        "versions": {p: metadata.version(p) for p in ("jax", "flax", "optax", "torch", "transformers")},
        "shape": f"{LAYERS} layers x {DIM}, {HEADS} heads, vocabulary {VOCAB}, {ROWS} rows x {LENGTH} tokens",
        "results": rows,
    }  # fmt: skip
    print(
        f"{report['shape']}; {report['date']}, {report['cores']} cores, load {report['load_average']:.1f}"
    )
    print(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(
        "                                                          seconds of a step / ours in bfloat16"
    )
    print(
        "program       dtype                  loss  tokens/s   CPU s     CPU   wall  best CPU   wall  goal"
    )
    for r in rows:
        ratios = f"{r['times_cpu']:8.2f}{r['times_wall']:7.2f}{r['best_times_cpu']:10.2f}{r['best_times_wall']:7.2f}"
        print(
            f"{r['name']:14}{r['dtype']:18}{r['loss']:9.4f}{r['tokens_per_second']:10,}{r['cpu_seconds']:8.2f}"
            f"{ratios}{r['goal'] or '':>6}"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
