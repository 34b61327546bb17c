"""Export and import of a BLOOM with random weights: peak memory, seconds, sizes.

    python benchmarks/bench_export.py [--gin_file 1b1.gin] [--json FILE]

A float32 checkpoint, written by a process with 8 virtual devices (mesh 1 x 2 x 4), is exported in bfloat16, and the
folder is imported again. Memory is the peak of each process (VmHWM), and the peak of what is no mapped file (RssAnon).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
_MAKE = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, {benchmarks!r})
import bench_export
bench_export.make_checkpoint({gin_file!r}, {folder!r})
"""
# Beside the peak of all resident memory, that of the part that is no mapped file: the kernel can drop the other.
_WATCH = """
import sys, threading, time
peak = [0]
def look():
    while True:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], 1024 * int(line.split()[1]))
        time.sleep(0.01)
threading.Thread(target=look, daemon=True).start()
from bloomjax import export, import_hf
try:
    {verb}.main(sys.argv)
finally:
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
    print("PEAK", 1024 * int(line.split()[1]), peak[0])
"""


def leaf(number: int, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Part of parameter `number`, float32: each row of the first dimension has a seed of its own."""
    rows = range(*index[0].indices(shape[0]))
    found = [
        np.random.default_rng((number, row)).standard_normal(shape[1:], np.float32)[index[1:]]
        for row in rows
    ]
    return np.stack(found)


def make_checkpoint(gin_file: str, folder: str) -> None:
    """A MODEL_DIR with a checkpoint of step 1, parameters only, from a mesh of 8 devices."""
    import jax
    import optax

    from bloomjax import config
    from bloomjax.checkpoints import Checkpoints
    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import TrainState, abstract_state

    model_dir = Path(folder)
    model = config.build("train.model", gin_file)
    optimizer = optax.sgd(0.0)  # without moments, which an export does not read
    abstract = abstract_state(model, optimizer, MeshShape(1, 2, 4).build())
    leaves, tree = jax.tree.flatten(abstract.params)
    params = tree.unflatten([
        jax.make_array_from_callback(
            x.shape, x.sharding, lambda index, n=n, x=x: leaf(n, x.shape, index)
        )
        for n, x in enumerate(leaves)
    ])  # fmt: skip
    step = jax.device_put(np.int32(1), abstract.step.sharding)
    checkpoints = Checkpoints(save_every_steps=1)
    checkpoints.open(model_dir / "checkpoints")
    data = {"vocabulary": None, "sequence_length": 2048}
    position = {"samples": 1, "record": {"step": 1}, "model": {}, "data": data}
    checkpoints.save(1, TrainState(step, params, optimizer.init(params)), position)
    checkpoints.close()
    (model_dir / "config.gin").write_text(f"include '{gin_file}'\n")


def run_make(gin_file: str, folder: Path) -> None:
    """`make_checkpoint` in a process with 8 devices."""
    code = _MAKE.format(
        benchmarks=str(REPOSITORY / "benchmarks"), gin_file=gin_file, folder=str(folder)
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def run_verb(verb: str, *flags: str) -> dict[str, float]:
    """Runs `export` or `import_hf`; its seconds and peaks of memory in bytes."""
    command = [sys.executable, "-c", _WATCH.format(verb=verb), *flags]
    started = time.monotonic()
    result = subprocess.run(
        command, check=True, env=_environment(), stdout=subprocess.PIPE, text=True
    )
    peak, peak_without_files = map(int, result.stdout.split("PEAK")[1].split())
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": peak,
        "peak_without_files_bytes": peak_without_files,
    }


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", default="1b1.gin")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_make(arguments.gin_file, folder / "run")
        figures = {
            "export to bfloat16": run_verb(
                "export", f"--checkpoint={folder}/run", f"--output={folder}/hf", "--dtype=bfloat16",
                "--max_shard_size=500MB",
            ),
            "import of it": run_verb(
                "import_hf", f"--input={folder}/hf", f"--output={folder}/back"
            ),
        }  # fmt: skip
        shards = [file.stat().st_size for file in sorted((folder / "hf").glob("*.safetensors"))]
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}
        | {"python": platform.python_version()},
        "model": arguments.gin_file,
        "figures": figures,
        "shards_bytes": shards,
    }  # fmt: skip
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
