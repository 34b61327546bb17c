"""Text in the languages of BLOOM: the Mixtures 'roots', 'roots_temperature' and 'roots_unimax'.

`register(folder)` takes a folder laid out as described in `text_files`; its languages carry
BLOOM's codes, all programming languages are the one language 'code' (one folder `code/`). The three
Mixtures share their Tasks 'roots.<language>', and so a token store; they differ in their rates:

    roots               what BLOOM was trained on: each token of ROOTS once. Weights: `languages`.
    roots_temperature   tokens^0.3, the exponent of BigScience's multilingual experiments and of the
                        text its tokenizer was trained on (data/sampling_probs/calc_iterator_prob.py)
    roots_unimax        as even as 366 billion tokens, BLOOM's, can be with no language seen more
                        than 4 times (Muennighoff et al. 2023, arXiv:2305.16264: up to 4 epochs are
                        almost as good as new text)

A training run chooses by `TrainData.weights`, with one of the tables below, or with weights
computed from the sizes in its store: gin/ablations/temperature.gin and unimax.gin.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from bloomjax.errors import BadInput
from bloomjax.mixture_weights import temperature_weights, unimax_weights
from bloomjax.tasks import text_files
from bloomjax.tasks.languages import CODE, ROOTS_TOKENS, ROOTS_WEIGHTS

MIXTURE = "roots"
ALPHA = 0.3
MAX_EPOCHS = 4
BUDGET_TOKENS = 366_000_000_000

ROOTS_TEMPERATURE_WEIGHTS: dict[str, float] = temperature_weights(ROOTS_TOKENS, 1 / ALPHA)
ROOTS_UNIMAX_WEIGHTS: dict[str, float] = unimax_weights(ROOTS_TOKENS, MAX_EPOCHS, BUDGET_TOKENS)


def find_languages(
    text_dir: str | os.PathLike[str], weights: Mapping[str, float] = ROOTS_WEIGHTS
) -> dict[str, tuple[Path, ...]]:
    """The files of each language; BadInput for a name that has no weight (by default, that BLOOM does not know)."""
    languages = text_files.find_languages(text_dir)
    unknown = [language for language in languages if language not in weights]
    if any(language.startswith(f"{CODE}-") for language in unknown):
        raise BadInput(
            f"{text_dir}: {', '.join(unknown)}: in ROOTS all programming languages are one, "
            f"put their folders into {os.path.join(text_dir, CODE)}"
        )
    if unknown:
        whose = "of BLOOM" if weights is ROOTS_WEIGHTS else "with a weight"
        raise BadInput(
            f"{text_dir}: no language {whose} is called {', '.join(unknown)}; "
            f"there are: {', '.join(sorted(weights))}"
        )
    return languages


def register(
    text_dir: str | os.PathLike[str],
    text_field: str = text_files.TEXT_FIELD,
    *,
    weights: Mapping[str, float] = ROOTS_WEIGHTS,
) -> None:
    """Registers the Tasks 'roots.<language>' and the three Mixtures.

    Rates of the languages that are there keep their proportions.

    Args:
      text_dir: the folder.
      text_field: field of JSON objects, column of tables.
      weights: rates of 'roots', for BLOOM's languages and others; the other two Mixtures are only registered if the
        folder has no others.

    Raises:
      BadInput: as `find_languages`, or a weight is not positive.
    """
    languages = find_languages(text_dir, weights)
    tasks = text_files.register_tasks(MIXTURE, languages, text_field)
    text_files.add_mixture(MIXTURE, tasks, weights)
    if languages.keys() <= ROOTS_TOKENS.keys():
        text_files.add_mixture(f"{MIXTURE}_temperature", tasks, ROOTS_TEMPERATURE_WEIGHTS)
        text_files.add_mixture(f"{MIXTURE}_unimax", tasks, ROOTS_UNIMAX_WEIGHTS)
