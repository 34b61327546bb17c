"""The languages of a configuration before it is run: shares, tokens, epochs, and what to be warned of.

    python tools/mixture_report.py --gin_file=tiny.gin
    python tools/mixture_report.py --gin_file=176b.gin --plot=mixture.png

Without a token store there are only the declared shares. With one, also its tokens, bytes per token, and epochs at the
planned number of samples; with the vocabulary of the store, tokens per word of the first 32,768 tokens (* where a
script sets no spaces between words: that is tokens per character, and is in no comparison). Warned is of: more than 4
epochs; a script whose languages together have less than 0.1 % of the tokens; tokens per word above twice the median; a
language of the store that is not in the mixture. --json prints one object, {"languages": [{"language", ...}], ...}.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config, language_report
from bloomjax.errors import BadInput
from bloomjax.language_report import LanguageRow
from bloomjax.mixture_weights import find_table, temperature_weights
from bloomjax.schedules import run_length_steps
from bloomjax.tasks import languages
from bloomjax.token_store import TokenStore, store_exists
from bloomjax.vocabulary import Vocabulary, open_vocabulary

FLAGS = flags.FlagValues()
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
_PLOT = flags.DEFINE_string(
    "plot", None, "Picture to write, *.png, *.svg or *.pdf.", flag_values=FLAGS
)

_FORMATS = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class Report:
    """What is printed: rows, the plan they belong to, and what is missing and why."""

    rows: list[LanguageRow]
    num_samples: int
    sequence_length: int
    num_tokens: int
    store_dir: str | None
    notes: list[str]


def describe() -> dict[str, tuple[str, str | None]]:
    """Name and script of every language the tables know; Simplified and Traditional Chinese are one script."""
    known: dict[str, tuple[str, str | None]] = {languages.CODE: ("Programming languages", None)}
    for language in languages.NATURAL_LANGUAGES:
        script = "Hani" if language.script in ("Hans", "Hant") else language.script
        known[language.code] = language.name, script
    for language in languages.PROGRAMMING_LANGUAGES:
        known[language.code] = language.name, None
    return known


def make_report() -> Report:
    """Of the gin flags of this process. BadInput as training would give it."""
    length = config.build("TrainData.sequence_length")
    schedule = config.build("train.batch_schedule")
    num_steps = run_length_steps(
        schedule, _bound("train.train_steps", None), _bound("train.train_samples", None)
    )
    num_samples = schedule.samples_after(num_steps)
    weights = _bound("TrainData.weights", None)
    store_dir = _bound("TrainData.store_dir", None)
    notes: list[str] = []
    if store_dir is None or not store_exists(store_dir):
        notes.append(f"no store at {store_dir}" if store_dir else "no STORE_DIR: shares only")
        found = language_report.rows(_shares_without_store(weights, store_dir, notes), describe())
        return Report(found, num_samples, length, num_samples * length, None, notes)
    data = config.build("train.train_data").open()
    if isinstance(weights, str):
        absent = sorted(set(find_table(weights)) - set(data.store.languages))
        if absent:
            notes.append(f"declared, but not in the store: {', '.join(absent)}")
    sources = {name: (data.store, name) for name in data.store.languages} | dict(data.sources)
    found = language_report.rows(
        language_report.declared_shares(data.kept, num_samples),
        describe(),
        sources=sources,
        vocabulary=_vocabulary(data.store, notes),
        epochs=language_report.epochs_seen(data.kept, data.sources, num_samples),
    )
    num_tokens = data.kept.tokens_after(num_samples)
    return Report(found, num_samples, length, num_tokens, store_dir, notes)


def _shares_without_store(
    weights: Any, store_dir: str | None, notes: list[str]
) -> dict[str, float]:
    """Those of a dict, of a table, or of a rule over the estimated sizes of ROOTS; of the first phase."""
    if callable(weights) and _bound("prepare.mixture_or_task_name", None) == "roots":
        notes.append("sizes for these weights: the estimated tokens of ROOTS")
        weights = weights(languages.ROOTS_TOKENS)
    if weights is None or callable(weights):
        raise BadInput(
            f"the shares of this configuration come from the store, and there is none at {store_dir}; make it with "
            f"python -m bloomjax.prepare and the same flags"
        )
    if _bound("TrainData.phases", ()):
        notes.append("shares of the first phase")
    table = find_table(weights) if isinstance(weights, str) else weights
    return temperature_weights(table, _bound("TrainData.temperature", 1.0))


def _vocabulary(store: TokenStore, notes: list[str]) -> Vocabulary | None:
    """That of the store, if it is there; else a note says why there is no fertility."""
    path = _bound("train.vocabulary_path", None)
    if path is None or not os.path.exists(path):
        notes.append(f"no tokens per word: no vocabulary {path or '(VOCABULARY is not given)'}")
        return None
    vocabulary = open_vocabulary(path)
    if vocabulary.fingerprint != store.vocabulary_fingerprint:
        notes.append(f"no tokens per word: {path} is not the vocabulary of the store")
        return None
    return vocabulary


def _bound(binding: str, default: Any) -> Any:
    """What the gin files give; `default` where nothing is bound, or only a macro without a value."""
    try:
        return config.build(binding)
    except BadInput as error:
        if "does not bind" in str(error) or "which has no value" in str(error):
            return default
        raise


# ---- printing ----


def table(report: Report) -> Iterator[str]:
    """The report as lines: plan, a row a language, notes."""
    rows = report.rows
    yield (
        f"{len(rows)} languages; planned are {report.num_samples:,} samples, "
        f"{report.num_tokens:,} tokens"
    )
    width = max(len("language"), *(len(row.language) for row in rows))
    names = max(len("name"), *(len(row.name or "") for row in rows))
    head = f"{'language':{width}}  {'name':{names}}  script  {'declared':>11}"
    if report.store_dir is not None:
        head += f"  {'in store':>11}  {'tokens':>17}  bytes/token  tokens/word  {'epochs':>8}"
    yield head + "  warnings"
    for row in rows:
        line = f"{row.language:{width}}  {row.name or '':{names}}  {row.script or '':6}"
        line += f"  {row.share_declared:11.6%}"
        if report.store_dir is not None:
            fertility = "-" if row.fertility is None else f"{row.fertility:.2f}"
            tokens = "-" if row.tokens is None else f"{row.tokens:,}"
            line += (
                f"  {_cell(row.share_in_store, '11.6%')}  {tokens:>17}  "
                f"{_cell(row.bytes_per_token, '11.2f')}  "
                f"{fertility + '*' * row.words_are_characters:>11}  {_cell(row.epochs, '8.3f')}"
            )
        yield f"{line}  {'; '.join(row.warnings)}".rstrip()
    num_warned = sum(bool(row.warnings) for row in rows)
    yield f"{num_warned} of {len(rows)} languages with warnings"
    yield from report.notes


def as_json(report: Report) -> dict[str, Any]:
    """The report as one object; what is not known is null."""
    return {
        "samples": report.num_samples,
        "tokens": report.num_tokens,
        "sequence_length": report.sequence_length,
        "store": report.store_dir,
        "notes": report.notes,
        "languages": [dataclasses.asdict(row) for row in report.rows],
    }


def _cell(value: float | None, spec: str) -> str:
    return f"{'-':>{int(spec.split('.')[0])}}" if value is None else format(value, spec)


# ---- the picture ----

_BLUE, _ORANGE, _GREY, _RED = "#2c6fad", "#e08a1e", "#c9ced4", "#c0392b"


def plot(report: Report, path: str) -> None:
    """One row a language: shares; with a store also bytes per token, tokens per word and epochs. Red is a warning."""
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput(f"--plot needs matplotlib: pip install 'bloomjax[plot]' ({error})") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report.rows
    has_store = report.store_dir is not None
    widths = [5, 2, 2, 3] if has_store else [6]
    figure, axes = pyplot.subplots(
        1, len(widths), sharey=True, squeeze=False, layout="constrained",
        figsize=(2.5 + sum(widths), 1.6 + 0.19 * len(rows)), width_ratios=widths,
    )  # fmt: skip
    panels = list(axes[0])
    _plot_shares(panels[0], rows, has_store)
    if has_store:
        _plot_bars(panels[1], rows, [row.bytes_per_token for row in rows], "bytes per token")
        median = language_report.median_fertility(rows)
        fertility = [None if row.words_are_characters else row.fertility for row in rows]
        limit = median and language_report.MAX_FERTILITY * median
        _plot_bars(panels[2], rows, fertility, "tokens per word", limit, "2 x median")
        _plot_epochs(panels[3], rows)
    labels = [f"{row.name}  {row.language}" if row.name else row.language for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=8)
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_color(_RED if row.warnings else "#222222")
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for panel in panels:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", alpha=0.3, linewidth=0.6)
        panel.set_axisbelow(True)
    figure.suptitle(
        f"{len(rows)} languages, {report.num_tokens:,} tokens planned"
        + (f", store {report.store_dir}" if has_store else "")
        + "; red: a warning",
        fontsize=10,
    )
    beside = Path(path).with_name(f".{Path(path).name}{Path(path).suffix}")
    figure.savefig(beside, dpi=110)
    beside.rename(path)
    pyplot.close(figure)


def _plot_shares(panel: Any, rows: Sequence[LanguageRow], has_store: bool) -> None:
    places = range(len(rows))
    both = [(i, row) for i, row in enumerate(rows) if row.share_in_store and row.share_declared]
    for i, row in both:
        panel.plot([row.share_in_store, row.share_declared], [i, i], color=_GREY, lw=2, zorder=1)
    if has_store:
        panel.scatter(
            [row.share_in_store or float("nan") for row in rows], places, s=26, zorder=2,
            facecolors="white", edgecolors=_ORANGE, linewidths=1.4, label="in the store",
        )  # fmt: skip
    panel.scatter(
        [row.share_declared or float("nan") for row in rows], places, s=16, color=_BLUE, zorder=3,
        label="declared",
    )  # fmt: skip
    _scale(panel, [x for row in rows for x in (row.share_declared, row.share_in_store) if x])
    panel.xaxis.set_major_formatter(
        lambda value, _: f"{100 * value:.7f}".rstrip("0").rstrip(".") + " %"
    )
    panel.set_xlabel("share of the tokens", fontsize=9)
    if has_store:
        panel.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False
        )


def _plot_bars(
    panel: Any,
    rows: Sequence[LanguageRow],
    values: Sequence[float | None],
    label: str,
    limit: float | None = None,
    limit_label: str = "",
) -> None:
    for i, row in enumerate(rows):
        if row.words_are_characters and values[i] is None:
            panel.text(0, i, " no spaces", color="#777777", fontsize=7, va="center")
    lengths = [value or 0.0 for value in values]
    colours = [_RED if limit and value > limit else _BLUE for value in lengths]
    panel.barh(range(len(rows)), lengths, height=0.62, color=colours, alpha=0.85)
    if limit:
        panel.axvline(limit, color=_RED, lw=1, ls="--")
        panel.text(limit, -0.9, limit_label, color=_RED, fontsize=7, ha="center", va="bottom")
    panel.set_xlabel(label, fontsize=9)


def _scale(panel: Any, values: Sequence[float]) -> None:
    """Logarithmic where a line from zero would crowd the small ones."""
    if max(values) > 30 * min(values):
        from matplotlib.ticker import NullFormatter

        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_xlim(0, 1.06 * max(values))


def _plot_epochs(panel: Any, rows: Sequence[LanguageRow]) -> None:
    limit = language_report.MAX_EPOCHS
    values = [row.epochs or float("nan") for row in rows]
    colours = [_RED if value > limit else _BLUE for value in values]
    for i, value in enumerate(values):
        if not rows[i].epochs:
            panel.text(
                0.01, i, "none", color="#777777", fontsize=7, va="center",
                transform=panel.get_yaxis_transform(),
            )  # fmt: skip
        panel.plot([limit, value], [i, i], color=_GREY, lw=1.2, zorder=1)
    panel.scatter(values, range(len(rows)), s=16, color=colours, zorder=2)
    panel.axvline(limit, color=_RED, lw=1, ls="--")
    panel.text(limit, -0.9, f"{limit:g} epochs", color=_RED, fontsize=7, ha="center", va="bottom")
    _scale(panel, [limit, *(row.epochs for row in rows if row.epochs)])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("epochs by the end", fontsize=9)


def _check_plot(path: str) -> None:
    if Path(path).suffix not in _FORMATS:
        raise BadInput(f"--plot={path}: pictures end in {', '.join(_FORMATS)}")
    if not Path(path).resolve().parent.is_dir():
        raise BadInput(f"--plot={path}: there is no folder {Path(path).parent}")


def main() -> None:
    if _PLOT.value:
        _check_plot(_PLOT.value)
    report = make_report()
    if _PLOT.value:
        plot(report, _PLOT.value)
    if _JSON.value:
        print(json.dumps(as_json(report), ensure_ascii=False))
    else:
        print(*table(report), sep="\n")


if __name__ == "__main__":
    config.call(main, own_flags=FLAGS)
