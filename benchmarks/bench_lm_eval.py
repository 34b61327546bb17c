"""Requests a second of lm-evaluation-harness: our model in its process against its own `hf` model on the export.

    python benchmarks/bench_lm_eval.py --checkpoint runs/tiny [--hf runs/tiny/hf/300] [--documents 64]

Needs `pip install 'lm-eval[hf]' torch`. The requests are those of a multiple-choice task of ragged lengths: a passage
of the demo corpus, some endings. Both are timed from texts to log-likelihoods, in float32, in turn, after a first pass
that compiles ours; `hf` with the best of several batch sizes. Their log-likelihoods are compared.
"""

import contextlib
import dataclasses
import io
import random
import statistics
import tempfile
import time
from pathlib import Path

import jax
import measure

from bloomjax import export
from bloomjax.errors import BadInput
from bloomjax.hf_model import open_model
from bloomjax.lm_eval_model import language_model
from bloomjax.partitioning import MeshShape
from bloomjax.scoring import Scorer

CORPUS = Path(__file__).resolve().parent.parent / "tasks" / "demo_corpus"
LANGUAGES = ("ar", "bn", "ca", "en", "es", "fr", "hi", "sw", "vi")


def make_requests(
    num_documents: int, num_endings: int, max_tokens: int, encode, seed: int = 0
) -> list:
    """(context, ending) of each request; `max_tokens` is of the longest, the shortest has an eighth."""
    from lm_eval.api.instance import Instance

    rng = random.Random(seed)
    words = {
        language: (CORPUS / f"{language}.txt").read_text(encoding="utf-8").split()
        for language in LANGUAGES
    }
    found = []
    for number in range(num_documents):
        text = words[LANGUAGES[number % len(LANGUAGES)]]
        first = rng.randrange(len(text))
        text = text * (2 + max_tokens // len(text))
        wanted = rng.randint(max_tokens // 8, max_tokens - max_tokens // 8)
        num = 1
        while len(encode(" ".join(text[first : first + num + 1]))) <= wanted:
            num += 1
        context = " ".join(text[first : first + num])
        for ending in range(num_endings):
            start = rng.randrange(len(text) - 2)
            words_of_ending = text[start : start + rng.randint(1, 2)]
            arguments = (context, " " + " ".join(words_of_ending))
            found.append(Instance("loglikelihood", {}, arguments, ending))
    return found


def seconds_of(function) -> tuple[float, list]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def compare(args, folder: str, max_length: int, requests: list, ours) -> dict:
    """Requests a second of both, the ratio of each round, and the largest difference."""
    from lm_eval.models.huggingface import HFLM

    theirs = {
        size: HFLM(
            pretrained=folder, dtype="float32", device="cpu", batch_size=size, max_length=max_length
        )
        for size in args.batch_sizes
    }
    first_seconds, scores = seconds_of(lambda: ours.loglikelihood(requests, disable_tqdm=True))
    found: dict[str, list[float]] = {name: [] for name in ("ours", *map(str, theirs))}
    difference = 0.0
    for _ in range(args.rounds):
        seconds, _scores = seconds_of(lambda: ours.loglikelihood(requests, disable_tqdm=True))
        found["ours"].append(seconds)
        for size, model in theirs.items():
            seconds, expected = seconds_of(
                lambda model=model: model.loglikelihood(requests, disable_tqdm=True)
            )
            found[str(size)].append(seconds)
            pairs = list(zip(scores, expected, strict=True))
            difference = max(difference, *(abs(a[0] - b[0]) for a, b in pairs))
            assert [bool(a[1]) for a, _ in pairs] == [b[1] for _, b in pairs]
    best = min(map(str, theirs), key=lambda size: min(found[size]))
    ratios = [a / b for a, b in zip(found[best], found["ours"], strict=True)]
    return {
        "requests": len(requests),
        "largest_difference": difference,
        "first_pass_seconds": first_seconds,
        "seconds": found,
        "best_hf_batch_size": int(best),
        "ours_requests_per_second": len(requests) / statistics.median(found["ours"]),
        "hf_requests_per_second": len(requests) / statistics.median(found[best]),
        "ratio": statistics.median(ratios),
        "ratio_of_best_rounds": min(found[best]) / min(found["ours"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = measure.Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="MODEL_DIR, or an HF folder")
    parser.add_argument("--hf", type=Path, help="its export; made if not given")
    parser.add_argument("--documents", type=measure.whole_number, default=64)
    parser.add_argument("--endings", type=measure.whole_number, default=4, help="of each document")
    parser.add_argument("--rounds", type=measure.whole_number, default=3)
    parser.add_argument("--max_length", type=measure.whole_number, help="of training by default")
    parser.add_argument("--batch_tokens", type=measure.whole_number, default=2048)
    parser.add_argument("--batch_sizes", type=measure.whole_number, nargs="+", default=[1, 8, 32])
    args = parser.parse_args(argv)
    measure.check_output(args.output)
    trained = open_model(args.checkpoint)
    if trained.vocabulary is None:
        raise BadInput(f"{args.checkpoint} has no tokenizer")
    mesh = MeshShape().build()
    model = type(trained.model)(dataclasses.replace(trained.model.config, dtype="float32"))
    max_length = args.max_length or trained.sequence_length
    scorer = Scorer(
        model, trained.read_params(model, mesh), mesh, max_length=max_length,
        batch_tokens=args.batch_tokens,
    )  # fmt: skip
    ours = language_model(scorer, trained.vocabulary)
    requests = make_requests(args.documents, args.endings, max_length, trained.vocabulary.encode)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.hf or Path(scratch) / "hf"
        if not args.hf:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                export.main(["export", f"--checkpoint={args.checkpoint}", f"--output={folder}"])
        found = compare(args, str(folder), max_length, requests, ours)
    found["shapes"] = len(scorer.shapes)
    found["parameters"] = sum(a.size for a in jax.tree.leaves(scorer.params))
    circumstances = measure.circumstances(jax.devices()[0])
    table = measure.columns(
        ("", "requests/s"),
        [
            ("ours", f"{found['ours_requests_per_second']:.1f}"),
            (f"hf, batch {found['best_hf_batch_size']}", f"{found['hf_requests_per_second']:.1f}"),
        ],
    )
    notes = (
        f"{found['requests']} requests ({args.endings} endings a document), {found['parameters']:,} parameters, "
        f"up to {max_length} tokens: ratio {found['ratio']:.2f} (median of rounds), "
        f"{found['ratio_of_best_rounds']:.2f} (best rounds); largest difference "
        f"{found['largest_difference']:.1e}; {found['shapes']} shapes, first pass with compilation "
        f"{found['first_pass_seconds']:.1f} s"
    )
    measure.finish(
        args, circumstances | found, f"{measure.headline(circumstances)}\n{table}\n{notes}"
    )
    return 0


if __name__ == "__main__":
    measure.run(main)
