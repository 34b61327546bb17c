"""While a run goes on: is its loss on the curve that a sweep predicts? As `tools/scaling.py check`, every N steps.

All state is in the run's own files: the loss so far in metrics.jsonl, what has been said in journal.jsonl. So a
restart, or a roll back, goes on where they end.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.journal import Journal, read_lines
from bloomjax.loss_curves import (
    Expectation,
    Verdict,
    check,
    check_text,
    loss_kind_of,
    smooth,
    thin,
)
from bloomjax.scaling_fits import Fit
from bloomjax.scaling_runs import Curve, num_params_of, text_of_run

OFF, BACK = "off_curve", "on_curve"  # events of the journal


def _is_off(verdict: Verdict) -> bool:
    """A loss that is low because the cosine has ended before the run is no surprise."""
    is_better = verdict.verdict == "better than predicted" and not verdict.remarks
    return verdict.verdict == "slow" or is_better


class PredictedLoss:
    """Writes the predicted loss beside the measured one, and says when the measured one is off for long.

    Each record of metrics.jsonl gets `predicted_loss`, `predicted_loss_low`, `predicted_loss_high`: what the smoothed
    loss should be there, and the band that a run on its curve leaves once in 1,000. Where it looks, also
    `smoothed_loss` and `curve_verdict`, that of `loss_curves.check`.

    Args:
      law: file of `tools/scaling.py fit --json`, of runs on the same text.
      every_steps: how often it looks. A law of validation losses is looked at with each evaluation.
      patience_steps: how long the verdict must be "slow", or "better than predicted", at every look before that is an
        incident: one line in the journal ("off_curve") and on stderr. Another look, another verdict: "on_curve".
    """

    def __init__(self, *, law: str, every_steps: int = 100, patience_steps: int = 1000):
        if every_steps < 1 or patience_steps < 1:
            raise BadInput(
                "PredictedLoss.every_steps and patience_steps must be at least 1, got "
                f"{every_steps} and {patience_steps}"
            )
        self._path, self._every, self._patience = law, every_steps, patience_steps
        self._fit = Fit.read(law, "PredictedLoss.law")
        try:
            Expectation(self._fit, 1e9, 1e10)
        except BadInput as error:
            raise BadInput(f"PredictedLoss.law={law}: {error}") from None
        self._key = "validation_loss" if loss_kind_of(self._fit) == "validation" else "loss"
        self._journal: Journal | None = None

    def params_of(self, shape: Mapping[str, Any]) -> int:
        """N of a model of this shape (`BloomConfig.shape`) as the law counts it."""
        return num_params_of(shape, self._fit.details)

    def begin(
        self,
        *,
        model_dir: Path,
        journal: Journal,
        params: float,
        end_tokens: float,
        schedule_tokens: float | None,
        sequence_length: int,
    ) -> None:
        """At each start and after a roll back, when metrics.jsonl ends with the step to go on from.

        Of the process that writes; in others `note` says nothing. params: `params_of` the model.
        schedule_tokens: where the cosine ends.
        """
        self._journal, self._model_dir = journal, model_dir
        self._params, self._end_tokens = params, end_tokens
        self._schedule_tokens, self._length = schedule_tokens, sequence_length
        self._expectation = Expectation(self._fit, params, end_tokens)
        self._steps: list[int] = []
        self._tokens: list[float] = []
        self._loss: list[float] = []
        for record in read_lines(model_dir / "metrics.jsonl")[0]:
            self._add(record)
        self._has_explained = False
        self._since: int | None = None  # first look of those in a row that were off
        self._verdict, self._is_told = "", False
        self._recall()

    def note(self, record: dict[str, Any]) -> dict[str, Any]:
        """What belongs into the record of a step, which has `step`, `tokens` and the loss."""
        if self._journal is None or record["step"] < 1:
            return {}
        found: dict[str, Any] = {}
        fraction = min(record["tokens"] / self._end_tokens, 1.0)
        band = self._expectation.band(np.array([fraction]))[:, 0]
        if np.isfinite(band).all():
            names = ("predicted_loss", "predicted_loss_low", "predicted_loss_high")
            found = {name: round(float(x), 6) for name, x in zip(names, band, strict=True)}
        if self._add(record) and self._is_look(record["step"]):
            verdict = self._check(len(self._steps))
            self._follow(record["step"], verdict)
            found |= {"smoothed_loss": round(verdict.loss, 6), "curve_verdict": verdict.verdict}
        return found

    def _add(self, record: dict[str, Any]) -> bool:
        """Whether it is a new point of the curve."""
        step, loss = record.get("step", 0), record.get(self._key)
        is_new = step > 0 and not (self._steps and step <= self._steps[-1])
        if not is_new or loss is None or not math.isfinite(loss):
            return False
        self._steps.append(step)
        self._tokens.append(record["tokens"])
        self._loss.append(loss)
        return True

    def _is_look(self, step: int) -> bool:
        return self._key == "validation_loss" or step % self._every == 0

    def _check(self, num_points: int) -> Verdict:
        """Of the first points of the curve, as `tools/scaling.py check` has it then."""
        tokens, loss = np.array(self._tokens[:num_points]), np.array(self._loss[:num_points])
        loss = smooth(loss) if self._key == "loss" else loss
        curve = Curve(
            str(self._model_dir), self._params, tokens, loss, schedule_tokens=self._schedule_tokens
        )
        verdict = check(thin(curve), self._end_tokens, self._fit, self._expectation)
        here = text_of_run(self._model_dir, self._length)
        found = check_text(verdict, self._fit, here)
        # A run that has just begun needs no such line: its band is wide, and gets narrower.
        if found is not verdict or (found.verdict == "cannot tell" and found.fraction >= 0.5):
            self._explain(found.reasons[0])
        return found

    # ---- what has been said ----

    def _recall(self) -> None:
        """Since when the run is off, as far as it has come again, and whether that was said."""
        assert self._journal is not None
        self._events = list(self._journal.events(OFF, BACK))
        last_step = self._steps[-1] if self._steps else 0
        said = [event for event in self._events if event["step"] <= last_step]
        if said and said[-1]["event"] == OFF:
            self._since, self._verdict = said[-1]["since_step"], said[-1]["verdict"]
            self._is_told = True
            return
        for place in range(len(self._steps), 0, -1):
            step = self._steps[place - 1]
            if step < last_step - self._patience:
                break
            if not self._is_look(step):
                continue
            found = self._check(place)
            if not _is_off(found) or found.verdict != (self._verdict or found.verdict):
                break
            self._since, self._verdict = step, found.verdict

    def _follow(self, step: int, found: Verdict) -> None:
        now = found.verdict if _is_off(found) else ""
        if now != self._verdict:
            if self._is_told:
                self._say(BACK, step, found, since_step=self._since)
            self._since, self._verdict, self._is_told = (step if now else None), now, False
        if self._since is None or self._is_told or step - self._since < self._patience:
            return
        self._is_told = True
        if not self._say(OFF, step, found, since_step=self._since):
            return
        assert found.expected is not None and found.interval is not None
        low, high = found.interval
        side = "above" if found.verdict == "slow" else "below"
        kind = "validation" if self._key == "validation_loss" else "training"
        course = "" if found.end_projected is None else f", on course for {found.end_projected:.4f}"
        print(
            f"bloomjax: step {step}: the {kind} loss {found.loss:.4f} is {side} what {self._path} predicts, "
            f"{found.expected:.4f} ({low:.4f} .. {high:.4f}), since step {self._since}; at the end "
            f"{found.end_predicted:.4f} was predicted{course} (off_curve in journal.jsonl)",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def _say(self, event: str, step: int, found: Verdict, since_step: int | None) -> bool:
        """False for what stands in the journal already: these steps are done again."""
        assert self._journal is not None
        key = "since_step" if event == OFF else "step"
        line: dict[str, Any] = {"step": step, "since_step": since_step, "verdict": found.verdict}
        if any(e["event"] == event and e[key] == line[key] for e in self._events):
            return False
        low, high = found.interval or (None, None)
        line |= {
            "loss": found.loss, "expected": found.expected, "low": low, "high": high,
            "end_predicted": found.end_predicted, "end_projected": found.end_projected, "law": self._path,
        }  # fmt: skip
        self._journal.write(event, **line)
        self._events.append({"event": event, **line})
        return True

    def _explain(self, reason: str) -> None:
        """Once a start: why the loss says nothing."""
        if not self._has_explained:
            line = f"{self._path} cannot tell whether this run is on its curve: {reason}"
            print(f"bloomjax: {line}", file=sys.stderr, flush=True)
        self._has_explained = True
