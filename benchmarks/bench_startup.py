"""From the command to the first finished step of tiny.gin, and the import of the trainer, on the CPU.

    python benchmarks/bench_startup.py [--runs N] [--json FILE]

Store, vocabulary and compilation cache are made once in a temporary folder; each run gets a MODEL_DIR of its own.
The clock stops when the record of step 1 stands in metrics.jsonl, which is after step 2 was dispatched.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

GOALS = {"first_step_seconds": 10.0, "import_seconds": 1.5}
IMPORT = """
import json, sys, time
start = time.perf_counter()
import bloomjax.train
print(json.dumps([time.perf_counter() - start, "tensorflow" in sys.modules]))
"""


def command(verb, folder, model_dir):
    paths = {
        "MODEL_DIR": model_dir, "STORE_DIR": folder / "tokens", "VOCABULARY": folder / "vocabulary.model",
        "train.compilation_cache_dir": folder / "xla",
    }  # fmt: skip
    flags = [f"--gin.{name}={str(path)!r}" for name, path in paths.items()]
    return [
        sys.executable,
        "-m",
        f"bloomjax.{verb}",
        "--gin_file=tiny.gin",
        "--gin.TRAIN_STEPS=3",
        *flags,
    ]


def first_step_seconds(folder, environment):
    model_dir = folder / "run"
    shutil.rmtree(model_dir, ignore_errors=True)
    started = time.perf_counter()
    with open(folder / "log", "w") as log:
        run = subprocess.Popen(
            command("train", folder, model_dir), stdout=log, stderr=log, env=environment
        )
        found = None
        while found is None and run.poll() is None:
            time.sleep(0.02)
            path = model_dir / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            if any('"step": 1,' in line for line in lines):
                found = time.perf_counter() - started
        run.wait()
    if found is None or run.returncode:
        raise SystemExit(f"training failed:\n{(folder / 'log').read_text()}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = command("prepare", folder, folder / "run")
        subprocess.run(prepare, env=environment, check=True, stdout=subprocess.DEVNULL)
        cold = first_step_seconds(folder, environment)
        warm = [first_step_seconds(folder, environment) for _ in range(args.runs)]
    imports, loaded = [], False
    for _ in range(args.runs):
        out = subprocess.run(
            [sys.executable, "-c", IMPORT],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        seconds, tensorflow = json.loads(out)
        imports.append(seconds)
        loaded |= tensorflow
    report = {
        "date": datetime.date.today().isoformat(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "versions": {p: metadata.version(p) for p in ("jax", "flax", "optax")},
        "load_average": os.getloadavg()[0],
        "first_step_seconds": round(statistics.median(warm), 2), "first_step_seconds_all": [round(x, 2) for x in warm],
        "first_step_seconds_without_compilation_cache": round(cold, 2),
        "import_seconds": round(statistics.median(imports), 2), "import_seconds_all": [round(x, 2) for x in imports],
        "tensorflow_loaded": loaded,
    }  # fmt: skip
    for key, value in report.items():
        print(f"{key}: {value}" + (f" (goal: at most {GOALS[key]})" if key in GOALS else ""))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
