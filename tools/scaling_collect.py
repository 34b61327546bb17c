"""Runs of bloomjax as rows for scaling laws: size from config.gin, loss from metrics.jsonl."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax import config
from bloomjax.data import OpenTrainData
from bloomjax.errors import BadInput
from bloomjax.journal import read_lines
from bloomjax.language_report import declared_shares
from bloomjax.loss_curves import smooth, thin
from bloomjax.scaling_runs import NON_EMBEDDING, Curve, num_params_of, text_of_run
from bloomjax.schedules import run_length_steps

COLUMNS = (
    "run", "params", "params_non_embedding", "tokens", "flops", "loss", "schedule_tokens", "unique_tokens",
    "loss_kind", "vocabulary", "sequence_length", "language", "share",
)  # fmt: skip
LOSS_KINDS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A MODEL_DIR: what was planned, and what its metrics.jsonl says so far.

    unique_by_language, shares: of its token store; None where the store cannot be opened. Shares that change on
    the way are the mean over all tokens.
    """

    path: Path
    params: int
    params_non_embedding: int
    sequence_length: int
    end_tokens: int
    end_samples: int
    schedule_tokens: int
    vocabulary: str
    unique_by_language: dict[str, int] | None
    shares: dict[str, float] | None
    records: list[dict[str, Any]]

    @property
    def unique_tokens(self) -> int | None:
        unique = self.unique_by_language
        return sum(unique.values()) if unique else None

    @property
    def is_finished(self) -> bool:
        return (
            self.records[-1]["samples"] >= self.end_samples
        )  # a curriculum sees fewer tokens of them

    def curve(self, loss_kind: str) -> Curve:
        """Its loss: of each training step under a Gaussian, or held-out at each evaluation."""
        key = "loss" if loss_kind == "train" else "validation_loss"
        # null: of a step that was not finite, and not taken.
        records = [r for r in self.records if r.get(key) is not None and r["step"] > 0]
        if not records:
            raise BadInput(f"{self.path}/metrics.jsonl has no {key} yet")
        loss = np.array([record[key] for record in records], float)
        return self._curve(records, smooth(loss) if loss_kind == "train" else loss)

    def curves_by_language(self) -> list[Curve]:
        """Held-out loss of each language at each evaluation."""
        records = [r for r in self.records if "loss_by_language" in r and r["step"] > 0]
        if not records:
            raise BadInput(f"{self.path}/metrics.jsonl has no loss_by_language yet")
        return [
            dataclasses.replace(
                self._curve(records, np.array([r["loss_by_language"][name] for r in records])),
                language=name,
                unique_tokens=(self.unique_by_language or {}).get(name),
                share=(self.shares or {}).get(name),
            )
            for name in records[-1]["loss_by_language"]
        ]

    def _curve(self, records: list[dict[str, Any]], loss: np.ndarray) -> Curve:
        tokens = np.array([record["tokens"] for record in records], float)
        curve = Curve(
            str(self.path), self.params, tokens, loss, self.schedule_tokens, self.unique_tokens
        )
        return thin(curve)


def read_run(path: str) -> RunFolder:
    """BadInput unless `path` holds config.gin and metrics.jsonl of a run that has done a step."""
    folder = Path(path)
    gin_file = folder / "config.gin"
    for file in (gin_file, folder / "metrics.jsonl"):
        if not file.is_file():
            there = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else []
            found = f"it has {', '.join(there)}" if there else "there is no such folder"
            raise BadInput(f"{folder} is no MODEL_DIR: no {file.name} ({found})")
    model = config.build("Bloom.config", gin_file)
    batches = config.build("train.batch_schedule", gin_file)
    length = config.build("TrainData.sequence_length", gin_file)
    num_steps = run_length_steps(
        batches,
        config.build("train.train_steps", gin_file),
        config.build("train.train_samples", gin_file),
    )
    records = _records(folder / "metrics.jsonl")
    end_samples = batches.samples_after(num_steps)
    decay_samples = config.build("train.learning_rate", gin_file).decay_samples
    data, unique, shares = _open_store(gin_file), None, None
    if data:
        unique = {name: data.store.num_tokens(name, "train") for name in data.mixture.names}
        shares = declared_shares(data.kept, end_samples)
        end_tokens, schedule_tokens = map(data.kept.tokens_after, (end_samples, decay_samples))
    else:
        end_tokens = _end_tokens(folder, records, end_samples, length)
        schedule_tokens = _tokens_after(decay_samples, records, end_samples, end_tokens, length)
    return RunFolder(
        path=folder,
        params=num_params_of(model.shape, {}),
        params_non_embedding=num_params_of(model.shape, {"params_column": NON_EMBEDDING}),
        sequence_length=length,
        end_tokens=end_tokens,
        end_samples=end_samples,
        schedule_tokens=schedule_tokens,
        vocabulary=text_of_run(folder, length)["vocabulary"],
        unique_by_language=unique,
        shares=shares,
        records=records,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """All lines but one that is still being written. BadInput before the first step."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise BadInput(f"{path} line {number} is damaged: {error}") from None
    if not any(record["step"] > 0 for record in records):
        raise BadInput(f"{path} has no step yet")
    return records


def _open_store(gin_file: Path) -> OpenTrainData | None:
    try:
        return config.build("train.train_data", gin_file).open()
    except BadInput:  # moved, or on another machine: the loss is here all the same
        return None


def _end_tokens(folder: Path, records: list[dict[str, Any]], end_samples: int, length: int) -> int:
    """Of a run whose store is not there: a curriculum or a phase makes samples shorter or longer."""
    if records[-1]["samples"] >= end_samples:
        return records[-1]["tokens"]
    plans = [line.get("plan") or {} for line in read_lines(folder / "journal.jsonl")[0]]
    planned = [plan["num_tokens"] for plan in plans if "num_tokens" in plan]
    return planned[-1] if planned else end_samples * length


def _tokens_after(
    samples: int, records: list[dict[str, Any]], end_samples: int, end_tokens: int, length: int
) -> int:
    """Tokens of `samples` samples, which may end before or after the run; from its records and its end."""
    if samples >= end_samples:
        return end_tokens + (samples - end_samples) * length
    known = [(0, 0), *((r["samples"], r["tokens"]) for r in records), (end_samples, end_tokens)]
    at, tokens = zip(*known, strict=True)
    return round(float(np.interp(samples, at, tokens)))


def rows(run: RunFolder, loss_kind: str, by_language: bool) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS, a row a point of each curve."""
    curves = run.curves_by_language() if by_language else [run.curve(loss_kind)]
    for curve in curves:
        for tokens, loss in zip(curve.tokens.tolist(), curve.loss.tolist(), strict=True):
            values = {
                "run": curve.name,
                "params": run.params,
                "params_non_embedding": run.params_non_embedding,
                "tokens": int(tokens),
                "flops": 6 * run.params * int(tokens),
                "loss": round(loss, 6),
                "schedule_tokens": run.schedule_tokens,
                "unique_tokens": curve.unique_tokens,
                "loss_kind": "validation" if by_language else loss_kind,
                "vocabulary": run.vocabulary,
                "sequence_length": run.sequence_length,
                "language": curve.language,
                "share": curve.share,
            }
            yield {name: "" if values[name] is None else values[name] for name in COLUMNS}
