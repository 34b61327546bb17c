"""Held-out loss of trained models at multiples of their training length, on the same tokens at each, under their own
objective."""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bloomjax import config
from bloomjax.data import EvalData, OpenTrainData, held_out_key, put_batch
from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.model_dir import open_model_dir
from bloomjax.objectives import identity
from bloomjax.partitioning import num_batch_shards
from bloomjax.run import held_out_losses
from bloomjax.startup import use_compilation_cache
from bloomjax.train_step import Batch, make_eval_step

FILE = "lengths.json"  # in a MODEL_DIR


def span_tokens(sequence_length: int, multiples: Sequence[int]) -> int:
    """The shortest text that windows of each length fill."""
    return sequence_length * math.lcm(*multiples)


def num_spans(data: OpenTrainData, span: int, max_tokens: int) -> dict[str, int]:
    """By language: held-out spans, at most so many that they hold `max_tokens` (one at least). Those without are left
    out; BadInput if that is all."""
    found = {}
    for name in data.mixture.names:
        store, language = data.sources[name]
        num = store.num_windows(language, "validation", span)
        if num:
            found[name] = min(num, max(1, max_tokens // span))
    if not found:
        raise BadInput(
            f"no language of {data.store.path} has {span} held-out tokens, which --lengths needs; hold out more "
            "(prepare.holdout_fraction) or give smaller multiples"
        )
    return found


def batches(
    data: OpenTrainData, spans: dict[str, int], span: int, length: int, num_rows: int, mesh: Any
) -> Iterator[tuple[list[str], Batch]]:
    """(language of each real row, batch) of windows of `length` tokens that cut up the spans."""
    windows = [(name, w) for name, num in spans.items() for w in range(num * span // length)]
    for first in range(0, len(windows), num_rows):
        part = windows[first : first + num_rows]
        rows, keys = {}, {}
        for row, (name, window) in enumerate(part):
            store, language = data.sources[name]
            rows[row] = store.read_windows(language, "validation", np.array([window]), length)[0]
            keys[row] = held_out_key(language, window)
        names = [name for name, _ in part]
        yield names, put_batch(rows, num_rows, length + 1, mesh, data.objective, keys)


def measure(model_dir: Path, multiples: Sequence[int]) -> dict[str, Any]:
    """{"lengths": {tokens: loss, or the line that says why there is none}, ...} of the newest checkpoint.

    The loss is that of the run's objective. Also kept in MODEL_DIR/lengths.json, which is read where it is of the same
    checkpoint and multiples.
    """
    trained = open_model_dir(model_dir)
    build = functools.partial(config.build, gin_file=model_dir / "config.gin")
    objective = build("train.train_data").objective
    asked = {"step": trained.step, "multiples": list(multiples), **identity(objective)}
    path = model_dir / FILE
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {key: kept.get(key) for key in asked} == asked:
            return kept
    use_compilation_cache()
    mesh = build("train.mesh").build()
    data, held_out = build("train.train_data").open(), build("train.eval_data")
    assert isinstance(held_out, EvalData)
    length = data.sequence_length
    span = span_tokens(length, multiples)
    spans = num_spans(data, span, held_out.max_windows_per_language * length)
    params = trained.read_params(trained.model, mesh)
    step = jax.jit(make_eval_step(trained.model, build("train.step")))
    found: dict[str, float | str] = {}
    for multiple in multiples:
        tokens = multiple * length
        if multiple > 1 and objective.why_no_longer:
            found[str(tokens)] = objective.why_no_longer
            continue
        try:
            trained.model.config.positions.check_length(tokens)
        except BadInput as error:
            found[str(tokens)] = str(error)
            continue
        # The same number of tokens in a batch as at evaluation.
        shards = num_batch_shards(mesh)
        num_rows = -(-max(1, held_out.batch_size_samples // multiple) // shards) * shards
        parts = batches(data, spans, span, tokens, num_rows, mesh)
        with jax.set_mesh(mesh):
            found[str(tokens)] = held_out_losses(step, params, parts)["validation_loss"]
    record = asked | {
        "training_length": length,
        "lengths": found,
        "num_tokens": sum(spans.values()) * span,
        "languages": sorted(spans),
        "left_out": sorted(set(data.mixture.names) - set(spans)),
    }
    write_whole(path, json.dumps(record).encode() + b"\n")
    return record
