"""The runs a scaling law is fitted to: read from a table, with columns, units and numbers checked."""

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax import flops
from bloomjax.errors import BadInput
from bloomjax.scaling_laws import FLOPS_PER_PARAM_TOKEN

# A run has at least two of the first three, and a loss.
NON_EMBEDDING = "params_non_embedding"  # the column of Kaplan's N
SIZES = ("params", "tokens", "flops")
NUMBERS = (*SIZES, "loss", "schedule_tokens", "unique_tokens", "share")
# What makes losses comparable: kept where all runs agree, so that `check` can compare it with a run.
TEXTS = ("loss_kind", "vocabulary", "sequence_length")
# Outside of this a column holds something else: published runs lie between 0.3 and 6,000.
_TOKENS_PER_PARAM = (1e-3, 1e6)
_MIN_PARAMS = 1000


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: its size and its loss along the way, or only at the end.

    name: label, or "line 7" of the table.
    params: N.
    tokens, loss: float64 [points], in the order of training; nats a token.
    schedule_tokens: where its cosine ends; None if unknown.
    unique_tokens: of the text it saw, in its language if it has one; None if unknown or never repeated.
    language, share: of which language the loss is, and the language's share of the tokens (0 to 1).
    """

    name: str
    params: float
    tokens: np.ndarray
    loss: np.ndarray
    schedule_tokens: float | None = None
    unique_tokens: float | None = None
    language: str | None = None
    share: float | None = None

    @property
    def is_matched(self) -> bool | None:
        """Whether the cosine ends within 25 % of the run's end, beyond which Chinchilla saw harm; None if unknown."""
        if self.schedule_tokens is None:
            return None
        return bool(0.8 <= self.schedule_tokens / self.tokens[-1] <= 1.25)


@dataclasses.dataclass(frozen=True)
class Runs:
    """How runs ended: float64 [runs] each. `unique_tokens` is `tokens` where nothing was repeated."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    unique_tokens: np.ndarray
    names: tuple[str, ...] = ()
    matched: tuple[bool | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("params", "tokens", "loss", "unique_tokens"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != np.shape(self.loss) or values.ndim != 1:
                raise BadInput(f"{name} has the shape {values.shape}, loss {np.shape(self.loss)}")
            object.__setattr__(self, name, values)
        if not self.names:
            names = tuple(f"run {number + 1}" for number in range(len(self.loss)))
            object.__setattr__(self, "names", names)
        if not self.matched:
            object.__setattr__(self, "matched", (None,) * len(self.loss))
        for number, name in enumerate(self.names):
            _check_numbers(name, self.params[number], self.tokens[number], self.loss[number])

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        """6ND of each run."""
        return FLOPS_PER_PARAM_TOKEN * self.params * self.tokens

    @classmethod
    def of(cls, params: Any, tokens: Any, loss: Any) -> "Runs":
        """From three arrays."""
        return cls(
            np.asarray(params, np.float64), np.asarray(tokens, np.float64),
            np.asarray(loss, np.float64), np.asarray(tokens, np.float64),
        )  # fmt: skip


def final_runs(curves: Sequence[Curve]) -> Runs:
    """The last point of each curve."""
    tokens = np.array([curve.tokens[-1] for curve in curves])
    # The text of a language is used up after so many tokens of its run.
    unique = [(curve.unique_tokens or math.inf) / (curve.share or 1.0) for curve in curves]
    return Runs(
        params=np.array([curve.params for curve in curves]),
        tokens=tokens,
        loss=np.array([curve.loss[-1] for curve in curves]),
        unique_tokens=np.minimum(tokens, unique),
        names=tuple(curve.name for curve in curves),
        matched=tuple(curve.is_matched for curve in curves),
    )


def _check_numbers(name: str, params: float, tokens: float, loss: float) -> None:
    for what, value in (("params", params), ("tokens", tokens), ("loss", loss)):
        if not (math.isfinite(value) and value > 0):
            raise BadInput(f"{name}: {what} is {value}; every run needs a number above 0")
    if not _TOKENS_PER_PARAM[0] <= tokens / params <= _TOKENS_PER_PARAM[1]:
        if tokens > params:
            raise BadInput(
                f"{name}: tokens is {tokens:.3g}, {tokens / params:.3g} a parameter; are these FLOPs? "
                "(name the column flops)"
            )
        raise BadInput(
            f"{name}: {tokens:.3g} tokens for {params:.3g} parameters; if tokens came from flops / 6N, "
            "does the column flops hold tokens? (name it tokens)"
        )


# ---- reading ----


def read_table(path: str | Path, rename: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows of a .csv, or of a .json (a list of objects) or .jsonl file; columns in `rename` get their new name.

    BadInput if the file is missing, empty, or a column to rename is not there.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        rows = _parse(path.suffix, text)
    except (json.JSONDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is not a table: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} has no rows")
    found = {name for row in rows for name in row}
    absent = sorted(set(rename or {}) - found)
    if absent:
        raise BadInput(
            f"{path} has no column {', '.join(absent)}; it has: {', '.join(sorted(found))}"
        )
    return [_renamed(row, rename or {}) for row in rows]


def _renamed(row: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """A renamed column takes the place of one that had its name."""
    found = {key: value for key, value in row.items() if key not in rename}
    return found | {new: row[old] for old, new in rename.items() if old in row}


def _parse(suffix: str, text: str) -> list[dict[str, Any]]:
    if suffix == ".json":
        found = json.loads(text)
        return found if isinstance(found, list) else []
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = []
    for row in csv.DictReader(text.splitlines()):
        row.pop(None, None)  # pyright: ignore[reportArgumentType, reportCallIssue]
        rows.append({key.strip(): value for key, value in row.items()})
    return rows


def read_curves(
    path: str | Path, rename: Mapping[str, str] | None = None
) -> tuple[list[Curve], dict[str, str], list[str]]:
    """Runs of a table, what all of them share (TEXTS), and remarks.

    Columns: loss, and two of params, tokens, flops (the third is C = 6ND). Optional: run (rows of one run are its
    curve; without it each row is a run), schedule_tokens, unique_tokens, language, share, and TEXTS. BadInput in one
    line for a missing column, a number that is none, and units mixed up.
    """
    rows = read_table(path, rename)
    columns = {name for row in rows for name in row}
    _check_columns(path, columns)
    numbers = [_numbers(f"{path} line {_line(path, n)}", row) for n, row in enumerate(rows)]
    # The flops that `collect` writes are of all parameters.
    is_kaplan = (rename or {}).get(NON_EMBEDDING) == "params"
    remarks = [] if is_kaplan else _compare_flops(path, numbers)
    groups: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        label = str(row.get("run") or "") or f"{path} line {_line(path, number)}"
        groups.setdefault((label, str(row.get("language") or "")), []).append(number)
    curves = [
        _curve(label, language, [numbers[n] for n in places])
        for (label, language), places in groups.items()
    ]
    shared = {}
    for name in TEXTS:
        values = {str(row.get(name) or "") for row in rows}
        if len(values) == 1 and "" not in values:
            shared[name] = values.pop()
        elif len(values) > 1:
            remarks.append(
                f"runs differ in {name}: {', '.join(sorted(v or 'none' for v in values))}"
            )
    return curves, shared, remarks


def _line(path: str | Path, number: int) -> int:
    return number + (2 if str(path).endswith(".csv") else 1)


def _check_columns(path: str | Path, columns: set[str]) -> None:
    missing = [] if "loss" in columns else ["loss"]
    sizes = [name for name in SIZES if name in columns]
    if len(sizes) < 2:
        absent = [name for name in SIZES if name not in columns]
        missing.append(
            f"{2 - len(sizes)} of {', '.join(absent)}"
            if sizes
            else "params and tokens (or flops for one of them)"
        )
    if missing:
        raise BadInput(
            f"{path} has no column {' and no '.join(missing)}; it has: {', '.join(sorted(columns))} "
            "(--columns=OLD:NEW renames)"
        )


def _numbers(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row; params, tokens and loss always, others where given."""
    found: dict[str, Any] = {"where": where}
    for name in NUMBERS:
        value = row.get(name)
        if value in (None, ""):
            continue
        try:
            found[name] = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise BadInput(f"{where}: {name} is {value!r}, not a number") from None
        if not math.isfinite(found[name]) or found[name] <= 0:
            raise BadInput(f"{where}: {name} is {value}; every run needs a number above 0")
    given = [name for name in SIZES if name in found]
    if len(given) < 2 or "loss" not in found:
        lacks = [name for name in (*SIZES, "loss") if name not in found]
        raise BadInput(f"{where} lacks {', '.join(lacks)}")
    if "tokens" not in found:
        found["tokens"] = found["flops"] / (FLOPS_PER_PARAM_TOKEN * found["params"])
    if "params" not in found:
        found["params"] = found["flops"] / (FLOPS_PER_PARAM_TOKEN * found["tokens"])
        if found["params"] < 1:
            raise BadInput(
                f"{where}: flops {found['flops']:.3g} is less than 6 x tokens {found['tokens']:.3g}; "
                "are the columns flops and tokens swapped?"
            )
    return found


def _compare_flops(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    ratios = [
        row["flops"] / (FLOPS_PER_PARAM_TOKEN * row["params"] * row["tokens"])
        for row in rows
        if "flops" in row
    ]
    if not ratios:
        return []
    middle = float(np.median(ratios))
    if not 0.1 <= middle <= 10:
        raise BadInput(
            f"{path}: flops is {middle:.3g} x 6 x params x tokens in the middle row; units are mixed up"
        )
    odd = [ratio for ratio in ratios if not 0.97 <= ratio <= 1.03]
    if odd:
        worst = max(odd, key=lambda ratio: abs(math.log(ratio)))
        return [
            f"flops is not 6 x params x tokens in {len(odd)} rows (up to a factor {worst:.3g}); "
            "the column is not used: C is 6ND throughout"
        ]
    return []


def _curve(label: str, language: str, rows: list[dict[str, Any]]) -> Curve:
    rows = sorted(rows, key=lambda row: row["tokens"])
    first, last = rows[0], rows[-1]
    # Of the end alone: on the way there, tokens start from nothing.
    _check_numbers(last["where"], last["params"], last["tokens"], last["loss"])
    sizes = [row["params"] for row in rows]
    if max(sizes) > 1.01 * min(sizes):  # from flops / 6D they may differ in the last digits
        raise BadInput(
            f"{first['where']}: the run {label} has params from {min(sizes):.4g} to {max(sizes):.4g}; "
            "a run has one size (rows without a run column are runs of their own)"
        )
    if min(sizes) < _MIN_PARAMS:
        raise BadInput(
            f"{first['where']}: params is {min(sizes):.4g}; are these millions or billions? (give plain numbers)"
        )
    share = last.get("share")
    if share is not None and share > 1:
        raise BadInput(f"{last['where']}: share is {share}; shares lie between 0 and 1")
    return Curve(
        name=label,
        params=last["params"],
        tokens=np.array([row["tokens"] for row in rows]),
        loss=np.array([row["loss"] for row in rows]),
        schedule_tokens=last.get("schedule_tokens"),
        unique_tokens=last.get("unique_tokens"),
        language=language or None,
        share=share,
    )


def num_params_of(shape: Mapping[str, Any], details: Mapping[str, Any]) -> Any:
    """N of a model (`BloomConfig.shape`; arrays too) as a law counts it, by the details of its fit: all parameters, or
    those outside the embedding where it was fitted on `params_non_embedding`."""
    if details.get("params_column") == NON_EMBEDDING:
        shape = {**shape, "vocab_size": 0, "num_positions": 0}
    return flops.num_params(**shape)


def text_of_run(model_dir: Path, sequence_length: int) -> dict[str, str]:
    """What its losses depend on beside size and length, as in TEXTS: a hash of its vocabulary ("" if none), tokens."""
    files = sorted((model_dir / "vocabulary").glob("*"))
    vocabulary = hashlib.sha256(files[0].read_bytes()).hexdigest()[:12] if files else ""
    return {"vocabulary": vocabulary, "sequence_length": str(sequence_length)}
