"""Runs that follow a planted law: final losses, isoFLOP sweeps, and loss curves that answer to their learning rate."""

import numpy as np

from bloomjax.loss_curves import smooth, thin
from bloomjax.scaling_laws import ParametricLaw
from bloomjax.scaling_runs import Curve, Runs

BUDGETS = np.geomspace(6e18, 3e21, 9)
LAW = ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def chinchilla_range(seed: int, noise: float = 0.005, num: int = 240, law=LAW) -> Runs:
    """Runs spread like those of Chinchilla: 57M to 16B parameters, 1.4B to 320B tokens, 1.4e18 to 1.3e22 FLOPs."""
    rng = np.random.default_rng(seed)
    runs = []
    while len(runs) < num:
        params = np.exp(rng.uniform(np.log(57e6), np.log(16.2e9)))
        tokens = np.exp(rng.uniform(np.log(1.4e9), np.log(320e9)))
        if 1.4e18 < 6 * params * tokens < 1.3e22 and 0.5 < tokens / params < 500:
            runs.append((params, tokens))
    params, tokens = np.array(runs).T
    loss = law.loss(params, tokens) * np.exp(noise * rng.standard_normal(num))
    return Runs.of(params, tokens, loss)


def isoflop(law, seed: int, noise: float = 0.002, budgets=BUDGETS) -> Runs:
    """Nine sizes around the best one at each budget."""
    rng = np.random.default_rng(seed)
    pairs = [
        (size, budget / 6 / size)
        for budget in budgets
        for size in law.optimum(budget).params * np.geomspace(1 / 4, 4, 9)
    ]
    params, tokens = np.array(pairs).T
    loss = law.loss(params, tokens) * np.exp(noise * rng.standard_normal(len(pairs)))
    return Runs.of(params, tokens, loss)


def horizons(law, seed: int, sizes: int = 9, noise: float = 0.002) -> list[Curve]:
    """Four horizons over a factor 16 for each size; the loss before the end is above that of a run ending there."""
    rng = np.random.default_rng(seed)
    curves = []
    for params in np.geomspace(5e7, 5e9, sizes):
        for horizon in (0.3, 0.75, 1.9, 4.8):
            end = law.optimum_of_params(params).tokens * horizon
            tokens = np.geomspace(0.02 * end, end, 200)
            early = 0.12 * (1 - tokens / end) * (tokens / end) ** 0.2
            loss = (law.loss(params, tokens) + early) * np.exp(noise * rng.standard_normal())
            curves.append(Curve(f"{params:.3g}/{horizon}", params, tokens, loss, end))
    return curves


def cosine(num_steps: int, peak=1.0, warmup=0.02, end=0.1, stretch=1.0) -> np.ndarray:
    """Learning rate of each step, of a cosine `stretch` times as long as the run; `warmup` is a share of the run."""
    done = (np.arange(num_steps) + 0.5) / num_steps
    progress = np.clip((done - warmup) / (stretch - warmup), 0, 1)
    decayed = peak * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * progress)))
    return np.where(done < warmup, peak * done / warmup, decayed)


def training_loss(
    params: float,
    tokens: float,
    rng: np.random.Generator,
    *,
    num_steps: int = 1000,
    run_noise: float = 0.001,
    step_noise: float = 0.01,
    **schedule,
) -> np.ndarray:
    """Loss of each step. Data count by the learning rate they were seen at; lowering the rate lowers the loss.

    A matched cosine ends on E + 0.05 + A / N^alpha + B' / D^beta whatever N and D, so approach 3 holds; any other
    schedule ends above it.
    """
    rate = cosine(num_steps, **schedule)
    seen = np.cumsum(rate) * tokens / num_steps / 0.545  # 1 x tokens for a matched cosine
    annealed, total = 0.0, np.empty(num_steps)
    lowered = np.maximum(-np.diff(rate, prepend=rate[0]), 0)
    memory = 0.0
    for step in range(num_steps):  # the effect of a lower rate comes with a delay of some 200 steps
        memory = memory * 0.995 + lowered[step]
        annealed += memory * 0.005
        total[step] = annealed
    loss = 1.6 + 400 * params**-0.34 + 1500 * seen**-0.35 + 0.3 * (1 - total)
    noise = run_noise * rng.standard_normal() + step_noise * rng.standard_normal(num_steps)
    return loss * np.exp(noise)


def training_curve(
    params: float, tokens: float, rng: np.random.Generator, done: float = 1.0, **schedule
) -> Curve:
    """The smoothed curve of the first `done` of a run that claims a cosine as long as itself."""
    loss = training_loss(params, tokens, rng, **schedule)
    upto = int(len(loss) * done)
    seen = tokens * np.arange(1, upto + 1) / len(loss)
    return thin(Curve("simulated", params, seen, smooth(loss[:upto]), schedule_tokens=tokens))


def best_params(flops: float) -> float:
    """About the best size of `training_loss`."""
    return 0.12 * flops**0.5


def sweep(seed: int, budgets=(1e18, 3e18, 9e18, 2.7e19, 8.1e19)) -> list[Curve]:
    """Five sizes at each budget, with their curves."""
    rng = np.random.default_rng(seed)
    curves = []
    for flops in budgets:
        for factor in (1 / 4, 1 / 2, 1, 2, 4):
            params = best_params(flops) * factor
            curves.append(training_curve(params, flops / 6 / params, rng))
    return curves
