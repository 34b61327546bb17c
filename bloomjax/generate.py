"""Text from a trained model: `python -m bloomjax.generate --checkpoint=MODEL_DIR --prompt="..."`."""

import sys
from pathlib import Path

import jax
from absl import flags

from bloomjax import config, decoding, partitioning
from bloomjax.checkpoints import Checkpoints
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.startup import use_compilation_cache
from bloomjax.train_step import abstract_params
from bloomjax.vocabulary import Vocabulary, open_vocabulary

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "MODEL_DIR of a run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of this step; the newest by default.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File with a prompt on each line.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "Tokens of prompt and text together; those of a training sequence by default.",
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k likeliest tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens up to this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def load_model(model_dir: Path, step: int | None) -> tuple[Bloom, dict, Vocabulary, int]:
    """Model, float32 parameters on one device, vocabulary and training sequence length of a run.

    Raises BadInput if the folder is no MODEL_DIR, has no such step, or the checkpoint is damaged.
    """
    if not (model_dir / "config.gin").is_file():
        raise BadInput(f"{model_dir} is no MODEL_DIR of a run: it has no config.gin")
    model = config.build("train.model", model_dir / "config.gin")
    checkpoints = Checkpoints(save_every_steps=1)
    checkpoints.open(model_dir / "checkpoints", read_only=True)
    position = checkpoints.read_position(step)
    mesh = partitioning.MeshShape(1, 1, 1).build(jax.devices()[:1])
    params = checkpoints.restore_params(position["step"], abstract_params(model, mesh))
    checkpoints.close()
    files = sorted((model_dir / "vocabulary").glob("*"))
    if len(files) != 1:
        raise BadInput(f"{model_dir}/vocabulary should hold one file, it holds {len(files)}")
    vocabulary, data = open_vocabulary(files[0]), position["data"]
    if vocabulary.fingerprint != data["vocabulary"]:
        raise BadInput(f"{files[0]} is not the vocabulary that {model_dir} was trained with")
    return model, params, vocabulary, data["sequence_length"]


def read_prompts() -> list[str]:
    """Prompts of --prompt and --prompt_file. BadInput if there are none or the file cannot be read."""
    prompts = list(_PROMPT.value)
    if _PROMPT_FILE.value:
        try:
            lines = Path(_PROMPT_FILE.value).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--prompt_file={_PROMPT_FILE.value} cannot be read: {error}") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise BadInput("nothing to continue: give --prompt=TEXT or --prompt_file=FILE")
    return prompts


def generate() -> int:
    """Prints each prompt with its continuation. Raises BadInput for a prompt longer than --max_length."""
    if not _CHECKPOINT.value:
        raise BadInput("give --checkpoint=MODEL_DIR")
    prompts = read_prompts()
    use_compilation_cache()
    model, params, vocabulary, sequence_length = load_model(Path(_CHECKPOINT.value), _STEP.value)
    max_length = sequence_length if _MAX_LENGTH.value is None else _MAX_LENGTH.value
    encoded = [vocabulary.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise BadInput("a prompt is empty")
        if len(ids) >= max_length:
            raise BadInput(
                f"prompt {prompt[:40]!r} has {len(ids)} tokens, which leaves no room within --max_length={max_length}"
            )
    if max_length > sequence_length:
        print(
            f"bloomjax: --max_length={max_length} is beyond the {sequence_length} tokens of training; "
            "ALiBi extrapolates, but nothing was trained there",
            file=sys.stderr,
        )
    texts = decoding.generate(
        model, params, encoded, max_new_tokens=max_length - min(map(len, encoded)),
        eos_id=vocabulary.eos_id, temperature=_TEMPERATURE.value, top_k=_TOP_K.value,
        top_p=_TOP_P.value, seed=_SEED.value,
    )  # fmt: skip
    for prompt, ids, text in zip(prompts, encoded, texts, strict=True):
        print(prompt + vocabulary.decode(text[: max_length - len(ids)]))
    return 0


if __name__ == "__main__":
    config.call(generate)
