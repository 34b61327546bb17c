"""Tokenising: the process pool of `prepare` against the tokenizer alone, on the same text with the same vocabulary.

    python benchmarks/bench_prepare.py [--megabytes N] [--runs N] [--json FILE]

The text is the demo corpus, 59 languages, repeated with the words of each document in another order. "Alone" is the
vocabulary's own `encode_batch`, on text in memory, with the tokens thrown away: by threads of one process as the
library starts them, and by as many processes as the pool has, whichever is faster. The pool reads the files, tokenises,
writes the shards, and merges them into a store: both are given. Rates are in tokens a second of wall time and of CPU
time; on a machine that others use the second is the steadier one. The two alternate, and each ratio is within one run.
"""

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from bloomjax import prepare_pool, prepare_shards, token_store, vocabulary
from bloomjax.prepare_shards import LanguageShards
from bloomjax.tasks import text_files

GOAL = 0.5
CORPUS = Path(text_files.__file__).resolve().parent / "demo_corpus"
DOCUMENTS_PER_BATCH = 256


def write_text(folder, megabytes):
    """Files of all languages, `megabytes` in all; returns {label: path}."""
    rng = np.random.default_rng(0)
    found = text_files.find_languages(CORPUS)
    del found["code"]
    found |= {f"code-{n}": f for n, f in text_files.find_languages(CORPUS / "code").items()}
    paths = {}
    for label, files in found.items():
        documents = [text for path in files for text in text_files.read_documents(path)]
        left = megabytes * 1e6 / len(found)
        paths[label] = folder / f"{label}.jsonl"
        with open(paths[label], "w") as file:
            while left > 0:
                for text in documents:
                    words = text.split(" ")
                    new = " ".join(words[i] for i in rng.permutation(len(words)))
                    left -= len(new.encode())
                    file.write(json.dumps({"text": new}) + "\n")
    return paths


def cpu_seconds():
    """Of this process and of those it has waited for."""
    usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(function):
    """Tokens, wall seconds, CPU seconds."""
    start, start_cpu = time.perf_counter(), cpu_seconds()
    num_tokens = function()
    return num_tokens, time.perf_counter() - start, cpu_seconds() - start_cpu


def encode_all(vocab, texts):
    batches = (
        texts[i : i + DOCUMENTS_PER_BATCH] for i in range(0, len(texts), DOCUMENTS_PER_BATCH)
    )
    return sum(sum(map(len, vocab.encode_batch(batch))) for batch in batches)


def encode_share(path, texts, pipe):
    """One of the processes that do nothing but tokenise; the clock starts when all are ready."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocab = vocabulary.open_vocabulary(path)
    is_sentencepiece = path.endswith(".model")
    pipe.send(None)
    pipe.recv()
    start, start_cpu = time.perf_counter(), time.process_time()
    num_tokens = (
        sum(len(vocab.encode(t)) for t in texts) if is_sentencepiece else encode_all(vocab, texts)
    )
    pipe.send((num_tokens, time.perf_counter() - start, time.process_time() - start_cpu))


def encode_in_processes(path, texts, num_workers):
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(num_workers):
        ours, theirs = context.Pipe()
        share = texts[number::num_workers]
        process = context.Process(target=encode_share, args=(path, share, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(None)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:  # else its CPU time is counted when it is waited for: in the pool's
        process.join()
    tokens, seconds, cpu = zip(*results, strict=True)
    return sum(tokens), max(seconds), sum(cpu)


def pool(paths, vocab, num_workers, folder, shard_bytes):
    """The two halves of `prepare`: shards, then the store; each as `measured`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "shards").mkdir(parents=True)
    groups = [
        LanguageShards(label, tuple(prepare_shards.plan(label, [str(path)], "text", shard_bytes)))
        for label, path in paths.items()
    ]
    shards = [shard for group in groups for shard in group.shards]
    counts = [0, 0]

    def report(task, num_documents, num_tokens, num_bytes):
        counts[0] += num_documents
        counts[1] += num_tokens

    def run(function, tasks):
        before = list(counts)
        for _ in prepare_pool.run(function, tasks, num_workers, report):
            pass
        return counts[1] - before[1]

    tokenise = functools.partial(
        prepare_shards.tokenise_shard, folder=str(folder / "shards"),
        vocabulary_path=str(vocab.path), fingerprint=vocab.fingerprint, threads=num_workers == 1,
    )  # fmt: skip
    tokenised = measured(lambda: run(tokenise, shards))
    with token_store.build_store(folder / "store") as root:
        merge = functools.partial(
            prepare_shards.merge_language, folder=str(folder / "shards"), root=root,
            holdout_fraction=0.05,
        )  # fmt: skip
        merged = measured(lambda: run(merge, groups))
        token_store.write_manifest(root, {}, vocab)
    return tokenised, merged, counts[0] // 2


def rates(result):
    num_tokens, seconds, cpu = result
    return {
        "tokens_per_second": round(num_tokens / seconds),
        "tokens_per_cpu_second": round(num_tokens / cpu),
    }


def compare(suffix, paths, texts, folder, num_workers, num_runs, vocab_size):
    vocab = vocabulary.TRAINERS[suffix](
        texts[:: max(1, len(texts) // 4000)], folder / f"v{suffix}", vocab_size
    )
    num_bytes = sum(path.stat().st_size for path in paths.values())
    shard_bytes = num_bytes // 40
    runs = []
    for _ in range(num_runs):
        threads = measured(lambda: encode_all(vocab, texts))
        processes = encode_in_processes(str(vocab.path), texts, num_workers)
        tokenised, merged, num_documents = pool(
            paths, vocab, num_workers, folder / "pool", shard_bytes
        )
        assert num_documents == len(texts)
        assert (
            tokenised[0] == merged[0] == threads[0] + num_documents == processes[0] + num_documents
        )
        whole = tokenised[0], tokenised[1] + merged[1], tokenised[2] + merged[2]
        run = {
            "alone_threads": rates(threads), "alone_processes": rates(processes),
            "shards": rates(tokenised), "shards_and_store": rates(whole),
        }  # fmt: skip
        for unit in ("tokens_per_second", "tokens_per_cpu_second"):
            best = max(run["alone_threads"][unit], run["alone_processes"][unit])
            for part in ("shards", "shards_and_store"):
                run[f"{part}_ratio_{unit}"] = round(run[part][unit] / best, 3)
        runs.append(run)
    ratios = {key: statistics.median(run[key] for run in runs) for key in runs[0] if "ratio" in key}
    return {"vocab_size": vocab.size, "num_tokens": threads[0], "median": ratios, "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=24_000)
    parser.add_argument("--json")
    options = parser.parse_args()
    num_workers = len(os.sched_getaffinity(0))
    result = {
        "date": datetime.date.today().isoformat(),
        "cores": num_workers,
        "python": platform.python_version(),
        "versions": {
            n: metadata.version(n) for n in ("sentencepiece", "tokenizers", "tensorstore")
        },
        "load_average_before": os.getloadavg()[0],
        "goal": GOAL,
        "megabytes": options.megabytes,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_text(folder, options.megabytes)
        texts = [text for path in paths.values() for text in text_files.read_documents(path)]
        for suffix, kind in ((".model", "sentencepiece"), (".json", "byte_level_bpe")):
            result[kind] = compare(
                suffix, paths, texts, folder, num_workers, options.runs, options.vocab_size
            )
            print(kind, json.dumps(result[kind]["median"]), flush=True)
    text = json.dumps(result, indent=1) + "\n"
    if options.json:
        Path(options.json).write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
