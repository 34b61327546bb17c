"""The Mixture 'demo': short texts shipped with the package, in every language of BLOOM.

`demo_corpus/<code>.txt` for the natural languages, `demo_corpus/code/<language>/` for programming
languages, read as described in `text_files`. Importing this module registers it.
"""

from pathlib import Path

from bloomjax.tasks import text_files

MIXTURE = "demo"
CORPUS = Path(__file__).resolve().parent / "demo_corpus"


def find_languages(corpus: Path = CORPUS) -> dict[str, tuple[Path, ...]]:
    """The files of each language: natural ones ('en'), then programming ones ('code-c')."""
    languages = text_files.find_languages(corpus)
    if languages.pop("code", None):
        code = text_files.find_languages(corpus / "code")
        languages |= {f"code-{name}": files for name, files in code.items()}
    return languages


def register() -> None:
    """Registers the Tasks 'demo.<language>' and the Mixture 'demo' of equal rates."""
    languages = find_languages()
    text_files.register_mixture(MIXTURE, languages, dict.fromkeys(languages, 1.0))


register()
