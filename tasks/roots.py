"""The Mixture 'roots': text in the languages of BLOOM, mixed in the shares BLOOM was trained on.

`register(folder)` takes a folder laid out as described in `text_files`; its languages carry
BLOOM's codes, all programming languages are the one language 'code' (one folder `code/`).
"""

import os
from pathlib import Path

from bloomjax.errors import BadInput
from bloomjax.tasks import text_files
from bloomjax.tasks.languages import CODE, ROOTS_WEIGHTS

MIXTURE = "roots"


def find_languages(text_dir: str | os.PathLike[str]) -> dict[str, tuple[Path, ...]]:
    """The files of each language; BadInput for a name BLOOM does not know."""
    languages = text_files.find_languages(text_dir)
    unknown = [language for language in languages if language not in ROOTS_WEIGHTS]
    if any(language.startswith(f"{CODE}-") for language in unknown):
        raise BadInput(
            f"{text_dir}: {', '.join(unknown)}: in ROOTS all programming languages are one, "
            f"put their folders into {os.path.join(text_dir, CODE)}"
        )
    if unknown:
        raise BadInput(
            f"{text_dir}: no language of BLOOM is called {', '.join(unknown)}; "
            f"there are: {', '.join(sorted(ROOTS_WEIGHTS))}"
        )
    return languages


def register(text_dir: str | os.PathLike[str], text_field: str = text_files.TEXT_FIELD) -> None:
    """Registers the Tasks 'roots.<language>' and the Mixture 'roots' with BLOOM's rates.

    Rates of the languages that are there keep their proportions.

    Raises:
      BadInput: as `find_languages`.
    """
    text_files.register_mixture(MIXTURE, find_languages(text_dir), ROOTS_WEIGHTS, text_field)
