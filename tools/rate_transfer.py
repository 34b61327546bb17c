"""Does the best learning rate stay where it is as the model gets wider? With muP it should.

    python tools/rate_transfer.py --gin_file=tiny.gin --widths=32,64,128,256 --plot=transfer.png

Trains a run for each width and each peak learning rate of a grid by factors of two, in standard parametrization and in
muP (arXiv 2203.03466, figure 1), and prints the loss at the end: a row a width, a column a rate, `*` at the best. The
cosine of the gin files is as long as the runs here. Exit code 2: with muP the best rate of some width is more than one
step of the grid from that of the narrowest.
"""

import dataclasses
import json
import math
from collections.abc import Sequence

import mup_plots
import numpy as np
import width_models
from absl import flags
from tqdm import tqdm

from bloomjax import config
from bloomjax.errors import BadInput
from bloomjax.model import BloomConfig
from bloomjax.schedules import CosineSchedule

_FLAGS = flags.FlagValues()
_WIDTHS = flags.DEFINE_string("widths", "32,64,128,256", "Of emb_dim.", flag_values=_FLAGS)
_RATES = flags.DEFINE_string(
    "rates", "-11:-4", "First and last peak learning rate, as powers of two.", flag_values=_FLAGS
)
_STEPS = flags.DEFINE_integer("steps", 100, "Of each run.", lower_bound=10, flag_values=_FLAGS)
_SEEDS = flags.DEFINE_integer("seeds", 1, "To average over.", lower_bound=1, flag_values=_FLAGS)
_GROW = flags.DEFINE_enum(
    "grow", "head_dim", width_models.GROW, "With the width: heads' size or number.", flag_values=_FLAGS
)  # fmt: skip
_PARAMETRIZATIONS = flags.DEFINE_string(
    "parametrizations", "sp,mup", f"Of {', '.join(width_models.PARAMETRIZATIONS)}.", flag_values=_FLAGS
)  # fmt: skip
_PLOT = flags.DEFINE_string("plot", None, "Picture to write.", flag_values=_FLAGS)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=_FLAGS)

_LAST_SHARE = 0.1  # of the steps of a run, whose mean loss is its loss
EXIT_MOVES = 2


def parse_rates(text: str) -> list[float]:
    """Of "-11:-4": 2^-11, 2^-10, ... 2^-4. BadInput unless there are three or more."""
    try:
        first, last = (int(word) for word in text.split(":"))
    except ValueError:
        first, last = 0, 0
    if last - first < 2:
        raise BadInput(f"--rates={text}: give two powers of two, such as -11:-4")
    return [2.0**power for power in range(first, last + 1)]


def schedule(like: CosineSchedule, peak: float, num_samples: int) -> CosineSchedule:
    """`like`, over `num_samples` and with another peak."""
    share = like.warmup_samples / like.decay_samples
    warmup = min(round(share * num_samples), num_samples - 1)
    return CosineSchedule(peak, peak * like.end / like.peak, warmup, num_samples)


def losses(
    base: width_models.Base, model: BloomConfig, rates: Sequence[float], num_steps: int, seeds: range, bar: tqdm
) -> np.ndarray:  # fmt: skip
    """Mean loss in nats a token of the last tenth of a run at each rate, float64 [rates]; infinite if it diverged."""
    training = width_models.Training(base, model)
    num_last = max(1, round(_LAST_SHARE * num_steps))
    found = np.zeros(len(rates))
    for number, peak in enumerate(rates):
        rate = schedule(base.learning_rate, peak, num_steps * base.batch_size_samples)
        for seed in seeds:
            run = [loss for _, loss in training.states(rate, num_steps, seed)][-num_last:]
            found[number] += np.mean(run) / len(seeds)
            bar.update()
    return np.where(np.isfinite(found), found, np.inf)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """losses: [widths, rates]."""

    parametrization: str
    widths: list[int]
    rates: list[float]
    losses: np.ndarray

    @property
    def best(self) -> list[int]:
        """Number of the best rate at each width."""
        return [int(number) for number in np.argmin(self.losses, axis=1)]

    def exact(self) -> list[float]:
        """log2 of the best rate at each width, between those of the grid: the parabola through the best three."""
        found = []
        for row, best in zip(self.losses, self.best, strict=True):
            near = slice(max(best - 1, 0), best + 2)
            x, y = np.log2(self.rates[near]), row[near]
            if len(x) < 3 or not np.isfinite(y).all():
                found.append(math.log2(self.rates[best]))
                continue
            a, b, _ = np.polyfit(x, y, 2)
            found.append(float(-b / (2 * a)))
        return found

    @property
    def moves(self) -> int:
        """Grid steps between the lowest and the highest of the best rates; below 0 where the wider has the lower."""
        low, high = min(self.best), max(self.best)
        return high - low if self.best.index(low) <= self.best.index(high) else low - high

    @property
    def at_edge(self) -> list[int]:
        """Widths whose best rate is the first or last of the grid: the true one may lie beyond it."""
        ends = 0, len(self.rates) - 1
        return [w for w, number in zip(self.widths, self.best, strict=True) if number in ends]

    @property
    def cost(self) -> float:
        """Loss of the widest at the best rate of the narrowest, above that at its own."""
        return float(self.losses[-1, self.best[0]] - self.losses[-1].min())


def report(sweep: Sweep) -> list[str]:
    """The table for people."""
    columns = "".join(f"{f'2^{round(math.log2(rate))}':>9}" for rate in sweep.rates)
    lines = [
        f"{sweep.parametrization}: loss by peak learning rate",
        f"  {'width':>6}{columns}     best",
    ]
    for width, row, best, exact in zip(
        sweep.widths, sweep.losses, sweep.best, sweep.exact(), strict=True
    ):
        cells = "".join(f"{x:>8.3f}{'*' if n == best else ' '}" for n, x in enumerate(row))
        lines.append(f"  {width:>6}{cells}   2^{exact:.2f}")
    factor = sweep.widths[-1] / sweep.widths[0]
    lines.append(
        f"  over a factor {factor:g} of width the best rate moves by {sweep.moves:+d} steps of the grid; the "
        f"narrowest's costs the widest {sweep.cost:.3f} nats"
    )
    if sweep.at_edge:
        lines.append(f"  at the end of the grid for {sweep.at_edge}: give other --rates")
    return lines


def as_json(sweeps: Sequence[Sweep]) -> str:
    """All numbers, by parametrization; null for a loss that is not finite."""
    return json.dumps(
        {
            sweep.parametrization: {
                "widths": sweep.widths,
                "rates": sweep.rates,
                "losses": [[x if math.isfinite(x) else None for x in r] for r in sweep.losses.tolist()],
                "best_rate": [sweep.rates[number] for number in sweep.best],
                "best_rate_log2": sweep.exact(),
                "moves": sweep.moves,
                "at_edge": sweep.at_edge,
                "cost": sweep.cost,
            }
            for sweep in sweeps
        }
    )  # fmt: skip


def rate_transfer() -> int:
    """What the flags ask for."""
    widths = width_models.parse_widths(_WIDTHS.value)
    names = width_models.parse_parametrizations(_PARAMETRIZATIONS.value)
    rates = parse_rates(_RATES.value)
    if _PLOT.value:
        mup_plots.check_path(_PLOT.value)
    base = width_models.read_base()
    seeds = range(base.seed, base.seed + _SEEDS.value)
    models = {name: [base.at(width, name, _GROW.value) for width in widths] for name in names}
    sweeps = []
    total = len(names) * len(widths) * len(rates) * len(seeds)
    with tqdm(total=total, unit="run", disable=None) as bar:
        for name in names:
            rows = [losses(base, model, rates, _STEPS.value, seeds, bar) for model in models[name]]
            sweeps.append(Sweep(name, widths, rates, np.stack(rows)))
    print(as_json(sweeps) if _JSON.value else "\n".join(line for s in sweeps for line in report(s)))
    if _PLOT.value:
        mup_plots.plot_transfer(sweeps, _PLOT.value)
    return EXIT_MOVES if any(s.parametrization == "mup" and abs(s.moves) > 1 for s in sweeps) else 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    config.call(rate_transfer, argv, _FLAGS)


if __name__ == "__main__":
    main()
