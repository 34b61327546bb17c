"""Text from a trained model: `python -m bloomjax.generate --checkpoint=MODEL_DIR --prompt="..."`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags

from bloomjax import config, decoding
from bloomjax.errors import BadInput
from bloomjax.model_dir import open_model_dir
from bloomjax.startup import use_compilation_cache

_FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "MODEL_DIR of a run.", flag_values=_FLAGS)
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of this step; the newest by default.", flag_values=_FLAGS
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue; may be given several times.", flag_values=_FLAGS
)
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "File with a prompt on each line.", flag_values=_FLAGS
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "Tokens of prompt and text together; those of a training sequence by default.",
    flag_values=_FLAGS,
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the likeliest token.", flag_values=_FLAGS
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Keep the k likeliest tokens; 0 keeps all.", flag_values=_FLAGS
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Keep the likeliest tokens up to this probability.", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", flag_values=_FLAGS)


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
    trained = open_model_dir(Path(_CHECKPOINT.value), _STEP.value)
    vocabulary, sequence_length = trained.vocabulary, trained.sequence_length
    if vocabulary is None:
        raise BadInput(
            f"{trained.path} was imported without a tokenizer, so no text can be generated"
        )
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
        trained.model, trained.read_params(), encoded, max_new_tokens=max_length - min(map(len, encoded)),
        eos_id=vocabulary.eos_id, temperature=_TEMPERATURE.value, top_k=_TOP_K.value,
        top_p=_TOP_P.value, seed=_SEED.value,
        sees_whole_prompt=trained.objective.sees_whole_prompt(),
    )  # fmt: skip
    for prompt, ids, text in zip(prompts, encoded, texts, strict=True):
        print(prompt + vocabulary.decode(text[: max_length - len(ids)]))
    return 0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(generate, argv, _FLAGS)


if __name__ == "__main__":
    main()
