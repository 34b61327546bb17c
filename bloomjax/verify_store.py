"""Checks a token store to the last bit: `python -m bloomjax.verify_store --store=runs/demo/tokens`.

Reads every chunk and compares checksums, counts, and document ends with the manifest. Each language
that is damaged gets a line with the range of tokens; the exit code is then 1.
"""

import time
from collections.abc import Iterator

from absl import flags

from bloomjax.errors import BadInput
from bloomjax.token_store import SPLITS, TokenStore

_FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "store", None, "Folder of the store, or a file://, gs:// or s3:// URL.", flag_values=_FLAGS
)


def damage(store: TokenStore) -> Iterator[str]:
    """One line for the first damage in each split of each language. Every byte is read.

    `store` must have been opened with cache_bytes=0: what is cached is not read again.
    """
    for language in store.languages:
        for split in SPLITS:
            try:
                store.verify_split(language, split)
            except BadInput as error:
                yield str(error)


def main() -> None:
    """Raises BadInput if there is no store, or if it is damaged."""
    path = _FLAGS.store
    if path is None:
        raise BadInput("--store=DIR is needed: the token store to check")
    start_seconds = time.monotonic()
    store = TokenStore(path, cache_bytes=0)
    num_damaged = 0
    for line in damage(store):
        num_damaged += 1
        print(line, flush=True)
    if num_damaged:
        raise BadInput(f"{path} is damaged in {num_damaged} of {2 * len(store.languages)} splits")
    num_tokens = sum(store.num_tokens(name, split) for name in store.languages for split in SPLITS)
    num_documents = sum(
        store.num_documents(name, split) for name in store.languages for split in SPLITS
    )
    seconds = time.monotonic() - start_seconds
    print(
        f"{path}: {len(store.languages)} languages, {num_documents:,} documents, "
        f"{num_tokens:,} tokens, nothing is damaged; {seconds:.1f} seconds, "
        f"{4 * num_tokens / seconds / 1e6:,.0f} MB/s"
    )


if __name__ == "__main__":
    from bloomjax import config

    config.call(main, own_flags=_FLAGS)
