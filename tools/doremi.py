"""What DoReMi's proxy run has found: shares of the languages, and a gin file that trains on them.

    python tools/doremi.py --model_dir=runs/proxy
    python tools/doremi.py --model_dir=runs/proxy --write=weights.gin                        # from the first sample on
    python tools/doremi.py --model_dir=runs/proxy --write=weights.gin --first_sample=200000  # as a phase of a run

`share` is the mean of the weights over the steps so far (docs/doremi.md), `reference` the share that the reference was
trained with; `at the end` and `excess loss` (nats a token) are those of the last step. --json prints one object.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config
from bloomjax.checkpoints import Checkpoints
from bloomjax.doremi import found_shares
from bloomjax.errors import BadInput
from bloomjax.files import write_whole

FLAGS = flags.FlagValues()
_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Of the proxy run.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of this step; the newest by default.", flag_values=FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
_WRITE = flags.DEFINE_string("write", None, "Gin file to write the shares to.", flag_values=FLAGS)
_FIRST_SAMPLE = flags.DEFINE_integer(
    "first_sample", 0, "The first that has these shares, in --write.", flag_values=FLAGS
)


def read(model_dir: str, step: int | None) -> dict[str, Any]:
    """Of a proxy run: step, reference, and a row a language, largest share first. BadInput if it is none."""
    path = Path(model_dir) / "checkpoints"
    if not path.is_dir():
        raise BadInput(f"--model_dir={model_dir} has no checkpoints")
    checkpoints = Checkpoints(save_every_steps=1)
    checkpoints.open(path, read_only=True)
    try:
        position = checkpoints.read_position(step)
    finally:
        checkpoints.close()
    state = position.get("reweighting")
    if state is None:
        raise BadInput(f"{model_dir} is no proxy run of DoReMi (gin/doremi.gin)")
    shares = found_shares(state)
    reference = state["reference"]
    rows = [
        {
            "language": name,
            "reference": reference["shares"].get(name),
            "share": share,
            "at_the_end": state["weights"][name],
            "excess_loss": state["excess"][name],
        }
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    return {
        "model_dir": model_dir,
        "step": position["step"],
        "num_steps": state["num_steps"],
        "reference_dir": reference["dir"],
        "reference_step": reference["step"],
        "languages": rows,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines to print."""
    lines = [
        f"{found['model_dir']}, step {found['step']}: mean of {found['num_steps']} steps; reference "
        f"{found['reference_dir']}, step {found['reference_step']}",
        f"{'language':<16}{'reference':>11}{'share':>11}{'x':>8}{'at the end':>12}{'excess loss':>13}",
    ]
    for row in found["languages"]:
        reference, share = row["reference"], row["share"]
        before = (
            f"{reference:>11.4%}{share / reference:>8.2f}" if reference else f"{'-':>11}{'-':>8}"
        )
        lines.append(
            f"{row['language']:<16}{before[:11]}{share:>11.4%}{before[11:]}{row['at_the_end']:>12.4%}"
            f"{row['excess_loss']:>13.4f}"
        )
    return lines


def gin_text(found: dict[str, Any], first_sample: int) -> str:
    """A gin file that trains on these shares: from the first sample on, or as the only phase that comes later."""
    shares = "".join(f"    {row['language']!r}: {row['share']!r},\n" for row in found["languages"])
    head = (
        f"# Token shares that DoReMi found (arXiv 2305.10429): mean of {found['num_steps']} steps of "
        f"{found['model_dir']},\n# reference {found['reference_dir']}, step {found['reference_step']}.\n"
    )
    if first_sample == 0:
        return f"{head}TrainData.weights = {{\n{shares}}}\nTrainData.temperature = 1.0\n"
    return (
        f"{head}TrainData.phases = (@doremi/Phase(),)\ndoremi/Phase.first_sample = {first_sample}\n"
        f"doremi/Phase.weights = {{\n{shares}}}\n"
    )


def write(path: Path, text: str) -> None:
    """BadInput where something is there, or a shipped gin file has the name, which this one would hide."""
    if path.exists():
        raise BadInput(f"--write={path} exists already")
    if (config.gin_dir() / path.name).exists():
        raise BadInput(
            f"--write={path}: a shipped gin file is called {path.name}; take another name"
        )
    if not path.resolve().parent.is_dir():
        raise BadInput(f"--write={path}: there is no folder {path.parent}")
    write_whole(path, text.encode())


def main() -> None:
    if _MODEL_DIR.value is None:
        raise BadInput("--model_dir of a proxy run must be given")
    if _FIRST_SAMPLE.value < 0 or (_FIRST_SAMPLE.value and not _WRITE.value):
        raise BadInput(f"--first_sample={_FIRST_SAMPLE.value} is for --write, and not below 0")
    found = read(_MODEL_DIR.value, _STEP.value)
    if _WRITE.value:
        write(Path(_WRITE.value), gin_text(found, _FIRST_SAMPLE.value))
    print(json.dumps(found, ensure_ascii=False) if _JSON.value else "\n".join(table(found)))


if __name__ == "__main__":
    config.call(main, own_flags=FLAGS)
