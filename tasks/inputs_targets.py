"""Tasks over JSON lines of examples, for multitask finetuning: T0, xP3 and the like.

As `text_files`, but each line of <name>.jsonl (or of the .jsonl files in <name>/) has two fields, "inputs" and
"targets". Both are taken as they are: a space between them belongs into one of them. The Tasks give both as raw text.
"""

import os

from bloomjax.examples import FIELDS
from bloomjax.tasks import text_files


def register(text_dir: str | os.PathLike[str]) -> None:
    """Registers the Tasks 'text_files.<name>' and the Mixture 'text_files' of equal rates; BadInput as there."""
    text_files.register(text_dir, FIELDS)
