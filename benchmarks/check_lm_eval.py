"""lm-evaluation-harness on an exported folder, and whether its log-likelihoods are ours.

    python benchmarks/check_lm_eval.py --checkpoint runs/tiny --hf runs/tiny/hf/300 --lm_eval lmenv/bin/lm_eval

The harness needs an environment of its own (`pip install 'lm-eval[hf]' torch`) and no network: the task is
benchmarks/lm_eval_task/. Ours are computed in float32 from the checkpoint itself.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.model import Bloom
from bloomjax.model_dir import Trained, open_model_dir

REPOSITORY = Path(__file__).resolve().parent.parent
TASK = "bloomjax_continuation"


def run_harness(lm_eval: str, hf_folder: str, output: str) -> list[dict]:
    """Runs `lm_eval --model hf`; what it says of each sample."""
    command = [
        lm_eval, "--model", "hf", "--model_args", f"pretrained={Path(hf_folder).resolve()},dtype=float32",
        "--include_path", "benchmarks/lm_eval_task", "--tasks", TASK, "--device", "cpu",
        "--batch_size", "4", "--output_path", output, "--log_samples",
    ]  # fmt: skip
    print(" ".join(command))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | offline)
    (samples,) = Path(output).rglob(f"samples_{TASK}_*.jsonl")
    return [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]


def our_log_likelihood(trained: Trained, params, start: str, ending: str) -> float:
    """Sum of the log probabilities of the tokens that `ending` adds to `start`."""
    assert trained.vocabulary is not None
    model = Bloom(dataclasses.replace(trained.model.config, dtype="float32"))
    num_given = len(trained.vocabulary.encode(start))
    ids = np.array([trained.vocabulary.encode(start + ending)])
    x_BLD = model.apply({"params": params}, jnp.asarray(ids[:, :-1]))
    logits_BLV = model.apply({"params": params}, x_BLD, method="logits")
    log_p_LV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_BLV)[0]))
    positions = np.arange(num_given - 1, ids.shape[1] - 1)
    return float(log_p_LV[positions, ids[0, positions + 1]].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("checkpoint", "hf", "lm_eval"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    trained = open_model_dir(Path(arguments.checkpoint))
    params = trained.read_params()
    with tempfile.TemporaryDirectory() as output:
        samples = run_harness(arguments.lm_eval, arguments.hf, output)
    largest, num = 0.0, 0
    for sample in samples:
        for ending, response in zip(sample["doc"]["endings"], sample["resps"], strict=True):
            theirs = float(response[0][0])
            ours = our_log_likelihood(trained, params, sample["doc"]["start"], ending)
            largest, num = max(largest, abs(ours - theirs) / abs(theirs)), num + 1
    print(f"{num} log-likelihoods: largest relative difference {largest:.1e}")
    assert largest < 1e-4


if __name__ == "__main__":
    main()
