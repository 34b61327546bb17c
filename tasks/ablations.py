"""English text of BigScience's 1.3B comparison of data sets: Mixtures 'oscar_en', 'c4_en' and 'pile'.

`register(folder)` takes a folder with any of these; files of all kinds in `text_files` will do:

    oscar-en/           OSCAR's English part (en_part_*.txt.gz, or JSON lines or Parquet)
    c4-en/              C4's English part (c4-train.*.json.gz; files named c4-validation.* are left
                        out, since the store holds documents out itself)
    pile/<component>    files or folders called as in PILE; what is missing is left out, the rest
                        keep their proportions

BigScience: train/tr3-1B3-baseline/ of bigscience-workshop/bigscience, tr3d (OSCAR), tr3e (C4) and
tr3m (the Pile). Its Pile was the published mixture in one piece; the published files hold all
components in turn, told apart by their field meta.pile_set_name.
"""

import dataclasses
import logging
import os
from pathlib import Path

from bloomjax.errors import BadInput
from bloomjax.tasks import text_files

OSCAR, C4, PILE_MIXTURE = "oscar_en", "c4_en", "pile"
_ENGLISH = "en"
_C4_HELD_OUT = "c4-validation."
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Component:
    """A component of the Pile: table 1 of Gao et al. 2020, arXiv:2101.00027.

    Attributes:
      label: in stores and mixtures.
      name: its pile_set_name.
      weight: share of the BYTES of the Pile's effective size; here taken as a share of tokens.
      num_epochs: how often the Pile repeats it.
      num_gib: size before repetition, 2^30 bytes.
    """

    label: str
    name: str
    weight: float
    num_epochs: float
    num_gib: float


_C = Component
PILE: tuple[Component, ...] = (
    _C("pile-cc", "Pile-CC", 0.1811, 1.0, 227.12),
    _C("pubmed-central", "PubMed Central", 0.1440, 2.0, 90.27),
    _C("books3", "Books3", 0.1207, 1.5, 100.96),
    _C("openwebtext2", "OpenWebText2", 0.1001, 2.0, 62.77),
    _C("arxiv", "ArXiv", 0.0896, 2.0, 56.21),
    _C("github", "Github", 0.0759, 1.0, 95.16),
    _C("freelaw", "FreeLaw", 0.0612, 1.5, 51.15),
    _C("stackexchange", "StackExchange", 0.0513, 2.0, 32.20),
    _C("uspto-backgrounds", "USPTO Backgrounds", 0.0365, 2.0, 22.90),
    _C("pubmed-abstracts", "PubMed Abstracts", 0.0307, 2.0, 19.26),
    _C("gutenberg-pg-19", "Gutenberg (PG-19)", 0.0217, 2.5, 10.88),
    _C("opensubtitles", "OpenSubtitles", 0.0155, 1.5, 12.98),
    _C("wikipedia-en", "Wikipedia (en)", 0.0153, 3.0, 6.38),
    _C("dm-mathematics", "DM Mathematics", 0.0124, 2.0, 7.75),
    _C("ubuntu-irc", "Ubuntu IRC", 0.0088, 2.0, 5.52),
    _C("bookcorpus2", "BookCorpus2", 0.0075, 1.5, 6.30),
    _C("europarl", "EuroParl", 0.0073, 2.0, 4.59),
    _C("hackernews", "HackerNews", 0.0062, 2.0, 3.90),
    _C("youtubesubtitles", "YoutubeSubtitles", 0.0060, 2.0, 3.73),
    _C("philpapers", "PhilPapers", 0.0038, 2.0, 2.38),
    _C("nih-exporter", "NIH ExPorter", 0.0030, 2.0, 1.89),
    _C("enron-emails", "Enron Emails", 0.0014, 2.0, 0.88),
)
PILE_WEIGHTS: dict[str, float] = {component.label: component.weight for component in PILE}


def find_languages(text_dir: str | os.PathLike[str]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """{Mixture: {language or component: its files}} of what the folder has.

    Raises:
      BadInput: the folder has none of them, one has no text, or pile/ has an unknown component.
    """
    root = Path(text_dir)
    if not root.is_dir():
        raise BadInput(f"there is no folder {root}")
    found: dict[str, dict[str, tuple[Path, ...]]] = {}
    for mixture, name in ((OSCAR, "oscar-en"), (C4, "c4-en")):
        if (root / name).is_dir():
            files = text_files.files_below(root / name)
            files = tuple(path for path in files if not path.name.startswith(_C4_HELD_OUT))
            if not files:
                raise BadInput(f"{root / name} has no text to train on")
            found[mixture] = {_ENGLISH: files}
    pile = root / "pile"
    if pile.is_dir():
        components = text_files.find_languages(pile)
        if unknown := [label for label in components if label not in PILE_WEIGHTS]:
            raise BadInput(
                f"{pile}: the Pile has no {', '.join(unknown)}; it has: {', '.join(PILE_WEIGHTS)}"
            )
        if missing := [label for label in PILE_WEIGHTS if label not in components]:
            _LOGGER.warning("%s has no %s", pile, ", ".join(missing))
        found[PILE_MIXTURE] = components
    if not found:
        raise BadInput(f"{root} has no text: no folder oscar-en, c4-en or pile")
    return found


def register(text_dir: str | os.PathLike[str], text_field: str = text_files.TEXT_FIELD) -> None:
    """Registers the Mixtures for which the folder has text, and their Tasks, such as 'c4_en.en'.

    Raises:
      BadInput: as `find_languages`.
    """
    for mixture, languages in find_languages(text_dir).items():
        rates = PILE_WEIGHTS if mixture == PILE_MIXTURE else {_ENGLISH: 1.0}
        text_files.register_mixture(mixture, languages, rates, text_field)
