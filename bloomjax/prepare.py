"""Text to token store: `python -m bloomjax.prepare --gin_file=tiny.gin`.

Reads every Task of a seqio Mixture, trains a vocabulary on the text if there is none yet, and
writes the token store that `train` reads. Nothing happens where the store is up to date; a store
made from something else is never touched.

The text is tokenised in shards, by all cores. After a kill at any moment the same command goes on
with the shards that are not finished. More than one machine:

    --shard=i/N    tokenises every N-th shard, from the i-th (0 <= i < N), and no more: a Slurm array
    --merge        makes the store of the finished shards
    --runner=NAME  tokenises in an Apache Beam pipeline: DirectRunner, FlinkRunner, SparkRunner, ...

These and --num_workers=N stand for gin bindings of `prepare`, as in --gin.prepare.num_workers=8.
The store has the same bytes whichever way it was made.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bloomjax import prepare_beam, prepare_pool, prepare_shards, token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.prepare_shards import LanguageShards, Shard
from bloomjax.task_text import (  # noqa: F401  some for the tools
    Language,
    check_enough,
    count_documents,
    find_languages,
    import_seqio,
    read_task,
    training_texts,
)
from bloomjax.token_store import SourceFile, TokenStore
from bloomjax.vocabulary import Vocabulary

# A model may have more ids than its vocabulary, to divide evenly; BLOOM has 200 more.
_MAX_UNUSED_TOKENS = 1024
# A worker takes half a second to start.
_SOURCE_BYTES_PER_WORKER = 8 << 20
_NAMED_SHARDS, _NAMED_REASONS = 5, 3
_FLAGS = ("shard", "merge", "runner", "num_workers")


def prepare(
    *,
    task_module: str,
    mixture_or_task_name: str,
    vocabulary_path: str,
    vocab_size: int,
    store_dir: str,
    text_dir: str | None = None,
    holdout_fraction: float = 0.05,
    skip_bad_documents: bool = False,
    makes_vocabulary: bool = True,
    num_workers: int | None = None,
    shards_dir: str | None = None,
    shard_bytes: int = prepare_shards.SHARD_BYTES,
    shard: str | None = None,
    merge: bool = False,
    runner: str | None = None,
    runner_options: Sequence[str] = (),
    pack_tokens: int | None = None,
) -> None:
    """Makes the token store `store_dir` of a Mixture or Task.

    Args:
      task_module: module that registers it, such as 'bloomjax.tasks.demo'.
      mixture_or_task_name: its name; each Task is one language of the store.
      vocabulary_path: a SentencePiece .model or a tokenizer.json. Where there is none, it is
        trained on the text that is not held out: a .model of SentencePiece, a .json of BLOOM's BPE.
      vocab_size: number of tokens of the vocabulary to train; one that exists may have up to
        1,023 fewer, for a model whose vocabulary was rounded up.
      store_dir: the store to make: a folder, or a file://, gs:// or s3:// URL.
      text_dir: folder with the text, for task modules that have none of their own.
      holdout_fraction: share of the documents of each language, at the end, for validation.
      skip_bad_documents: whether documents that cannot be read (bad JSON, no UTF-8, a file that is
        cut short) are left out and counted in the manifest; by default they are refused.
      makes_vocabulary: whether a vocabulary that is missing is trained; else that is refused.
      num_workers: number of processes; by default one for each core, fewer for little text.
      shards_dir: folder for finished shards, which takes as much space as the store until that is
        made; by default the store's name and '.shards'. All machines must see it.
      shard_bytes: bytes of source files in a shard, which is what a kill can cost each process.
      shard: 'i/N': only tokenise every N-th shard, from the i-th.
      merge: only make the store of the finished shards.
      runner: Apache Beam runner that tokenises in place of processes here.
      runner_options: flags for it, such as '--flink_master=host:8081'.
      pack_tokens: SEQUENCE_LENGTH, for Tasks of inputs and targets: none crosses a multiple of it.

    Raises:
      BadInput: the text, the vocabulary or an existing store cannot be used as asked.
    """
    start_seconds = time.monotonic()
    token_store.check_holdout_fraction(holdout_fraction)
    share = _parse_share(shard)
    if [share is not None, merge, runner is not None].count(True) > 1:
        raise BadInput("--shard, --merge and --runner exclude each other")
    _check_positive(num_workers=num_workers, shard_bytes=shard_bytes, pack_tokens=pack_tokens)
    folder = _shards_folder(store_dir, shards_dir)
    _check_outside(text_dir, store_dir, str(folder))
    found = find_languages(task_module, mixture_or_task_name, text_dir)
    languages = [dataclasses.replace(each, skip_bad=skip_bad_documents) for each in found]
    _check_packing(languages, pack_tokens)
    if token_store.store_exists(store_dir):
        vocab = _open_vocabulary(vocabulary_path, vocab_size)
        store = TokenStore(store_dir)
        _check_up_to_date(store, languages, vocab, holdout_fraction, pack_tokens)
        if share is None:
            _remove_what_made(folder)
        _say(f"{store_dir} is up to date, nothing to do: {_summary(store)}")
        return
    if os.path.exists(vocabulary_path):
        vocab = _open_vocabulary(vocabulary_path, vocab_size)
    elif not makes_vocabulary:
        raise BadInput(
            f"there is no vocabulary {vocabulary_path}, and none is to be made here "
            "(prepare.makes_vocabulary); was the model's folder moved?"
        )
    elif share or merge or runner:
        raise BadInput(
            f"there is no vocabulary {vocabulary_path}; before several machines tokenise with it, "
            f"train it with tools/train_vocabulary.py"
        )
    else:
        vocab = _train_vocabulary(languages, vocabulary_path, vocab_size, holdout_fraction)
    _say(f"vocabulary {vocabulary_path}: {vocab.size:,} tokens")
    groups = [
        _plan(language, shard_bytes, task_module, mixture_or_task_name, text_dir)
        for language in languages
    ]
    shards = _largest_first(groups)
    num_workers = num_workers or _default_num_workers(shards)
    with _work_folder(folder, alone=share is None, merge=merge):
        if runner is not None:
            _tokenise_by_beam(shards, folder, vocab, runner, runner_options)
        elif share is not None:
            i, n = share
            _tokenise(shards[i::n], folder, vocab, num_workers)
            _say(f"shard {i}/{n}: done; when all {n} are, --merge makes the store")
            return
        elif not merge:
            _tokenise(shards, folder, vocab, num_workers)
        store = _merge(store_dir, groups, folder, vocab, holdout_fraction, num_workers, pack_tokens)
    _say(f"{store_dir}: {_summary(store)}, {time.monotonic() - start_seconds:.1f} seconds")


# --- What is asked for ---------------------------------------------------------------------------


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise BadInput(f"{name} must be at least 1, got {number}")


def _check_packing(languages: Sequence[Language], pack_tokens: int | None) -> None:
    kinds = {language.has_targets for language in languages}
    if len(kinds) > 1:
        raise BadInput("Tasks of text and Tasks of inputs and targets do not go into one store")
    if True in kinds and pack_tokens is None:
        raise BadInput(
            "Tasks of inputs and targets need prepare.pack_tokens, the SEQUENCE_LENGTH of training "
            "(ablations/inputs_targets.gin)"
        )
    if True not in kinds and pack_tokens is not None:
        raise BadInput("prepare.pack_tokens is for Tasks of inputs and targets; these are of text")


def _parse_share(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise BadInput(f"--shard={shard} is no share of the work; write i/N with 0 <= i < N")
    return int(found[1]), int(found[2])


def _shards_folder(store_dir: str, shards_dir: str | None) -> Path:
    if shards_dir is not None:
        return Path(shards_dir)
    if local := _local(store_dir):
        return Path(f"{local}.shards")
    raise BadInput(
        f"the store {store_dir} is no local folder: give one for the finished shards, "
        f"--gin.prepare.shards_dir=\"'FOLDER'\""
    )


def _local(path: str) -> str:
    """The path of a local folder; '' for a URL of something else."""
    local = path.removeprefix("file://").rstrip("/")
    return "" if "://" in local else local


def _check_outside(text_dir: str | None, *paths: str) -> None:
    """Raises BadInput where what is written would become text."""
    for path in filter(_local, paths):
        if text_dir and Path(_local(path)).resolve().is_relative_to(Path(text_dir).resolve()):
            raise BadInput(f"the store {path} must lie outside the folder of the text {text_dir}")


def _open_vocabulary(path: str, vocab_size: int) -> Vocabulary:
    vocab = vocabulary.open_vocabulary(path)
    if not 0 <= vocab_size - vocab.size < _MAX_UNUSED_TOKENS:
        raise BadInput(f"the vocabulary {path} has {vocab.size} tokens, VOCAB_SIZE is {vocab_size}")
    return vocab


def _train_vocabulary(
    languages: Sequence[Language], path: str, vocab_size: int, holdout_fraction: float
) -> Vocabulary:
    suffix = Path(path).suffix
    train = vocabulary.TRAINERS.get(suffix)
    if train is None:
        raise BadInput(
            f"there is no vocabulary {path}; to train one, give it a name that ends in "
            f".model (SentencePiece) or .json (byte-level BPE)"
        )
    vocabulary.check_new_vocabulary(Path(path), suffix, vocab_size)
    languages = count_documents(languages)
    _say(f"training a vocabulary of {vocab_size:,} tokens on {len(languages)} languages")
    return train(training_texts(languages, holdout_fraction), path, vocab_size)


def _plan(language: Language, shard_bytes: int, *name: Any) -> LanguageShards:
    if not language.through_seqio:
        shards = prepare_shards.plan(
            language.label, language.files, language.text_field, shard_bytes, language.skip_bad
        )
    else:
        read = functools.partial(read_task, *name, language.label)
        num_bytes = prepare_shards.SHARD_BYTES  # nobody knows
        shards = [Shard(language.label, 0, 1, language.files, num_bytes=num_bytes, read=read)]
    return LanguageShards(language.label, tuple(shards))


def _largest_first(groups: Sequence[LanguageShards]) -> list[Shard]:
    """All shards, the ones that take long first: what ends last is short."""
    shards = [shard for group in groups for shard in group.shards]
    return sorted(shards, key=lambda shard: -shard.num_bytes)


def _default_num_workers(shards: Sequence[Shard]) -> int:
    num_bytes = sum(shard.num_bytes for shard in shards)
    try:
        num_cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        num_cores = os.cpu_count() or 1
    return max(1, min(num_cores, num_bytes // _SOURCE_BYTES_PER_WORKER))


# --- The work ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(folder: Path, *, alone: bool, merge: bool) -> Iterator[None]:
    """Makes the folder of the shards and locks it; parts of an array share it, others have it `alone`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another process works on the shards in {folder} now") from None
        except OSError:
            pass  # a network disk without locks
        try:
            if alone and not merge:
                _remove_unfinished(folder)
            yield
        finally:
            if alone:
                if not merge:
                    _remove_unfinished(folder)
                if not any(folder.glob(f"*{prepare_shards.SUFFIX}")):
                    (folder / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something is left in it
                folder.rmdir()


def _remove_unfinished(folder: Path) -> None:
    """What processes that were killed have left."""
    for path in folder.glob(f"*{prepare_shards.UNFINISHED}*"):
        path.unlink(missing_ok=True)


def _remove_what_made(folder: Path) -> None:
    """Removes the shards of a store that is finished, where a kill came in between."""
    if folder.is_dir():
        with _work_folder(folder, alone=True, merge=False):
            _remove_shards(folder)


def _remove_shards(folder: Path) -> None:
    _remove_unfinished(folder)
    for path in folder.glob(f"*{prepare_shards.SUFFIX}"):
        path.unlink(missing_ok=True)


def _tokenise(shards: Sequence[Shard], folder: Path, vocab: Vocabulary, num_workers: int) -> None:
    num_workers = min(num_workers, len(shards))
    _say(f"tokenising {len(shards)} shards with {num_workers} processes")
    tokenise = _tokenise_shard(folder, vocab, threads=num_workers == 1)
    progress = _Progress("tokenised", {shard.name: shard.num_bytes for shard in shards}, 2)
    num_kept = 0
    with contextlib.closing(
        prepare_pool.run(tokenise, shards, num_workers, progress.report)
    ) as results:
        for shard, is_new in results:
            progress.finish(shard.name)
            num_kept += not is_new
    progress.close()
    if num_kept:
        _say(f"{num_kept} of {len(shards)} shards were finished already and are kept")


def _tokenise_by_beam(
    shards: Sequence[Shard], folder: Path, vocab: Vocabulary, runner: str, options: Sequence[str]
) -> None:
    _say(f"tokenising {len(shards)} shards with Apache Beam's {runner}")
    prepare_beam.run(_tokenise_shard(folder, vocab, threads=False), shards, runner, options)


def _tokenise_shard(folder: Path, vocab: Vocabulary, *, threads: bool) -> functools.partial[bool]:
    return functools.partial(
        prepare_shards.tokenise_shard,
        folder=str(folder),
        vocabulary_path=str(vocab.path),
        fingerprint=vocab.fingerprint,
        threads=threads,
    )


def _merge(
    store_dir: str,
    groups: Sequence[LanguageShards],
    folder: Path,
    vocab: Vocabulary,
    holdout_fraction: float,
    num_workers: int,
    pack_tokens: int | None,
) -> TokenStore:
    """Makes the store of finished shards, and removes them."""
    num_tokens = _check_finished(groups, folder, vocab)
    _say(f"writing {store_dir}: training + validation")
    progress = _Progress("written", num_tokens, 1)
    entries: dict[str, Any] = {}
    # A name of its own, so that the next start can remove what a kill leaves.
    local = _local(store_dir)
    partial = f"{local}.partial-merge" if local else None
    with token_store.build_store(store_dir, partial=partial) as root:
        write = functools.partial(
            prepare_shards.merge_language,
            folder=str(folder),
            root=root,
            holdout_fraction=holdout_fraction,
            pack_tokens=pack_tokens,
        )
        with contextlib.closing(
            prepare_pool.run(write, groups, num_workers, progress.report)
        ) as results:
            for group, entry in results:
                progress.finish(group.name)
                entries[group.name] = entry
        progress.close()
        token_store.write_manifest(root, entries, vocab, holdout_fraction=holdout_fraction)
    width = max(map(len, entries))
    for number, group in enumerate(groups, 1):
        _say(f"{group.name:{width}}  {number:2}/{len(groups)}  {_numbers(entries[group.name])}")
    _remove_shards(folder)
    return TokenStore(store_dir)


def _check_finished(
    groups: Sequence[LanguageShards], folder: Path, vocab: Vocabulary
) -> dict[str, int]:
    """Number of tokens of each language; BadInput if shards are missing or a language is too short."""
    missing = [
        shard.name
        for group in groups
        for shard in group.shards
        if not prepare_shards.is_finished(str(folder), shard, vocab.fingerprint)
    ]
    if missing:
        named = ", ".join(missing[:_NAMED_SHARDS])
        more = f" and {len(missing) - _NAMED_SHARDS} more" if len(missing) > _NAMED_SHARDS else ""
        num_shards = sum(len(group.shards) for group in groups)
        raise BadInput(
            f"{len(missing)} of {num_shards} shards are not finished in {folder}, or are of other "
            f"text or another vocabulary: {named}{more}; run their --shard=i/N again"
        )
    num_documents, num_tokens = {}, {}
    for group in groups:
        headers = [prepare_shards.read_header(str(folder), shard) or {} for shard in group.shards]
        num_documents[group.name] = sum(header["num_documents"] for header in headers)
        num_tokens[group.name] = sum(header["num_tokens"] for header in headers)
        if not num_documents[group.name]:
            files = [path for shard in group.shards for path in shard.files] or ["its Task"]
            raise BadInput(
                f"'{group.name}' has no text: nothing but whitespace in {', '.join(files[:3])}"
            )
        _say_bad(group.name, headers)
    check_enough(num_documents)
    return num_tokens


def _say_bad(language: str, headers: Sequence[dict[str, Any]]) -> None:
    num_bad = sum(header["num_bad_documents"] for header in headers)
    if num_bad:
        reasons = [reason for header in headers for reason in header["bad"]]
        more = ", ..." if num_bad > _NAMED_REASONS else ""
        _say(
            f"{language}: {num_bad} documents cannot be read and are left out: "
            f"{'; '.join(reasons[:_NAMED_REASONS])}{more}"
        )


# --- A store that is there -----------------------------------------------------------------------


def _check_up_to_date(
    store: TokenStore,
    languages: Sequence[Language],
    vocab: Vocabulary,
    holdout_fraction: float,
    pack_tokens: int | None,
) -> None:
    """Raises BadInput that says in what an existing store differs from what is asked for."""
    differences = []
    if store.vocabulary_fingerprint != vocab.fingerprint:
        differences.append(
            f"the vocabulary ({store.vocabulary_fingerprint[:12]}, now {vocab.fingerprint[:12]})"
        )
    if store.manifest["holdout_fraction"] != holdout_fraction:
        differences.append(
            f"the held-out fraction ({store.manifest['holdout_fraction']}, now {holdout_fraction})"
        )
    if others := {store.pack_tokens(each) for each in store.languages} - {pack_tokens}:
        differences.append(f"pack_tokens ({', '.join(map(str, others))}, now {pack_tokens})")
    asked = {language.label: language for language in languages}
    if gone := [label for label in store.languages if label not in asked]:
        differences.append(f"no longer there: {', '.join(gone)}")
    if new := [label for label in asked if label not in store.languages]:
        differences.append(f"new: {', '.join(new)}")
    changed = [
        label for label in store.languages if label in asked and not _same_text(store, asked[label])
    ]
    if changed:
        differences.append(f"the text of {', '.join(changed)}")
    if differences:
        raise BadInput(
            f"the store {store.path} was made from something else: {'; '.join(differences)}. "
            f"Delete it or choose another STORE_DIR"
        )


def _same_text(store: TokenStore, language: Language) -> bool:
    entry = store.manifest["languages"][language.label]
    then = [(source["num_bytes"], source["sha256"]) for source in entry["sources"]]
    if language.files:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            sources = list(threads.map(SourceFile.of, language.files))
    elif then:
        sources = [prepare_shards.source_of_task(language.label, language.documents())]
    else:  # a store of the time when the number of documents was all that was kept of such Tasks
        now = language.counted()
        num_documents = sum(store.num_documents(now.label, split) for split in token_store.SPLITS)
        return (num_documents, entry["num_skipped_documents"]) == (
            now.num_documents,
            now.num_skipped_documents,
        )
    return then == [(source.num_bytes, source.sha256) for source in sources]


# --- What is said --------------------------------------------------------------------------------


class _Progress:
    """One line on a terminal that rewrites itself; in a log, one line now and then."""

    def __init__(self, verb: str, sizes: dict[str, int], unit: int, log_seconds: float = 15.0):
        """`sizes` of the pieces of work, in what number `unit` of a report (documents, tokens, bytes) counts."""
        self._verb, self._sizes, self._unit = verb, sizes, unit
        self._tty = sys.stderr.isatty()
        self._wait_seconds = 0.2 if self._tty else log_seconds
        self._start = self._last = time.monotonic()
        self._begun: dict[str, int] = {}
        self._num_documents = self._num_tokens = self._done = 0
        self._left = sum(sizes.values())

    def report(self, task: Any, *numbers: int) -> None:
        self._num_documents += numbers[0]
        self._num_tokens += numbers[1]
        self._begun[task.name] = self._begun.get(task.name, 0) + numbers[self._unit]
        if time.monotonic() - self._last >= self._wait_seconds:
            self._last = time.monotonic()
            self._show()

    def finish(self, name: str) -> None:
        if self._begun.pop(name, 0):
            self._done += self._sizes[name]
        self._left -= self._sizes[name]

    def close(self) -> None:
        if self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if self._num_tokens:
            _say(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        return (
            f"{self._verb} {self._num_documents:,} documents, {self._num_tokens:,} tokens, "
            f"{self._num_tokens / max(seconds, 1e-6):,.0f} tokens/s"
        )

    def _show(self) -> None:
        begun = sum(min(done, self._sizes[name]) for name, done in self._begun.items())
        line, done, left = self._line(), self._done + begun, self._left - begun
        if done:
            eta = int((time.monotonic() - self._start) / done * left)
            line += f", ETA {eta // 3600}:{eta % 3600 // 60:02d}:{eta % 60:02d}"
        if self._tty:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            _say(line)


def _numbers(entry: dict[str, Any]) -> str:
    train, validation = (entry["splits"][split] for split in token_store.SPLITS)
    return (
        f"{train['num_documents']:9,} +{validation['num_documents']:7,} documents "
        f"{train['num_tokens']:13,} +{validation['num_tokens']:10,} tokens"
    )


def _summary(store: TokenStore) -> str:
    num_documents = sum(
        store.num_documents(name, split) for name in store.languages for split in token_store.SPLITS
    )
    num_train, num_validation = (
        sum(store.num_tokens(name, split) for name in store.languages)
        for split in token_store.SPLITS
    )
    return (
        f"{len(store.languages)} languages, {num_documents:,} documents, "
        f"{num_train:,} tokens to train and {num_validation:,} to validate"
    )


def _say(line: str) -> None:
    """A whole line at once: it reads the same on a terminal and in a log."""
    print(line, flush=True)


def _as_bindings(arguments: Sequence[str]) -> list[str]:
    """The flags of this verb as the gin bindings that they are short for."""
    found = []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in _FLAGS:
            if name == "merge":
                value = value.capitalize() or "True"
            elif name != "num_workers":
                value = repr(value)
            argument = f"--gin.prepare.{name}={value}"
        found.append(argument)
    return found


if __name__ == "__main__":
    from bloomjax import config

    config.run("prepare", _as_bindings(sys.argv))
