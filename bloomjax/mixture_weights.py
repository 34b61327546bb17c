"""Token shares of languages from their sizes: by temperature, by UniMax, or from a table. Numbers only.

`TrainData.weights` takes a TemperatureWeights or UniMaxWeights: called with the number of tokens of each language,
it returns the share of each.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any

from bloomjax.errors import BadInput


def check_weights(weights: Mapping[Any, float], what: str = "weight") -> None:
    """BadInput that names each weight which is no positive finite number, or says that there is none."""
    if not weights:
        raise BadInput(f"there is no {what}")
    bad = {name: w for name, w in weights.items() if not _is_positive(w)}
    if bad:
        some = ", ".join(f"'{name}' has {w!r}" for name, w in list(bad.items())[:5])
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise BadInput(f"each {what} must be a positive number: {some}{more}")


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights as shares that sum to 1; raises as `check_weights`, also where the sum is infinite."""
    check_weights(weights)
    try:
        total = math.fsum(weights.values())
    except OverflowError:
        raise BadInput("the weights are too large: their sum is infinite") from None
    return {name: w / total for name, w in weights.items()}


def covering(
    weights: Mapping[str, float], languages: Mapping[str, Any] | list[str], where: str
) -> dict[str, float]:
    """The weights of exactly these languages, in their order; BadInput names those without a weight."""
    without = [language for language in languages if language not in weights]
    if without:
        raise BadInput(f"{where} gives no weight to: {', '.join(without)}")
    return {language: weights[language] for language in languages}


def find_table(name: str) -> dict[str, float]:
    """The dict of numbers called "module:NAME", e.g. "bloomjax.tasks.languages:ROOTS_WEIGHTS".

    Raises:
      BadInput: there is no such module or name, or it is no dict of positive numbers.
    """
    module, _, attribute = name.partition(":")
    try:
        table = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"'{name}' is not 'module:NAME' of a dict: {error}") from error
    if not isinstance(table, dict):
        raise BadInput(f"'{name}' is not a dict but a {type(table).__name__}")
    check_weights(table, f"number in {name}")
    return table


def temperature_weights(weights: Mapping[str, float], temperature: float) -> dict[str, float]:
    """w^(1/T) / sum: T = 1 keeps the shares, larger T evens them out.

    With alpha = 1/T it is p^alpha of mBERT, XLM-R (arXiv:1911.02116) and mT5 (arXiv:2010.11934).

    Raises:
      BadInput: weights or temperature are not positive, or so far apart that a share is 0 or infinite.
    """
    if not _is_positive(temperature):
        raise BadInput(f"temperature must be a positive number, got {temperature!r}")
    check_weights(weights)
    try:
        return normalised({name: w ** (1.0 / temperature) for name, w in weights.items()})
    except (OverflowError, BadInput):
        raise BadInput(f"temperature {temperature!r} is too low for these weights") from None


def unimax_weights(
    num_tokens: Mapping[str, float], max_epochs: float, budget_tokens: float
) -> dict[str, float]:
    """UniMax (Chung et al. 2023, arXiv:2304.09151, algorithm 1): even shares, none above `max_epochs` epochs.

    From the smallest language to the largest, each gets an equal part of what is left of the budget, or all of its
    epochs if that is less.

    Args:
      num_tokens: size of each language.
      max_epochs: how often the run may see a language.
      budget_tokens: length of the run.

    Returns:
      Shares that sum to 1; share * budget_tokens <= max_epochs * num_tokens for each language.

    Raises:
      BadInput: a number is not positive, or the budget is more than all epochs of all languages, where the paper's
        algorithm would exceed its own cap.
    """
    for name, value in (("max_epochs", max_epochs), ("budget_tokens", budget_tokens)):
        if not _is_positive(value):
            raise BadInput(f"{name} must be a positive number, got {value!r}")
    check_weights(num_tokens, "number of tokens")
    most = max_epochs * math.fsum(num_tokens.values())
    if budget_tokens > most:
        raise BadInput(
            f"{max_epochs:g} epochs of the {len(num_tokens)} languages are {most:,.0f} tokens, "
            f"less than budget_tokens={budget_tokens:,.0f}; raise max_epochs or lower the budget"
        )
    left = float(budget_tokens)
    spent: dict[str, float] = {}
    for number, name in enumerate(sorted(num_tokens, key=lambda name: (num_tokens[name], name))):
        even = left / (len(num_tokens) - number)
        spent[name] = min(even, max_epochs * num_tokens[name])
        left -= spent[name]
    return {name: spent[name] / budget_tokens for name in num_tokens}


class TemperatureWeights:
    """Shares n_i^alpha / sum over the tokens n_i of each language; alpha is 1/T. alpha = 1 keeps them as they are."""

    def __init__(
        self,
        *,
        alpha: float | None = None,
        temperature: float | None = None,
        num_tokens: dict[str, float] | str | None = None,
    ):
        """
        Args:
          alpha: the exponent; give it or `temperature`.
          temperature: T = 1/alpha.
          num_tokens: sizes to use in place of the store's, or "module:NAME" of a table of them, such as
            "bloomjax.tasks.languages:ROOTS_TOKENS".

        Raises:
          BadInput: both or none of alpha and temperature, or one that is not positive.
        """
        if (alpha is None) == (temperature is None):
            raise BadInput("give either alpha or temperature = 1/alpha")
        for name, value in (("alpha", alpha), ("temperature", temperature)):
            if value is not None and not _is_positive(value):
                raise BadInput(f"{name} must be a positive number, got {value!r}")
        self._temperature = temperature if alpha is None else 1.0 / alpha
        self._num_tokens = num_tokens

    def __call__(self, num_tokens: Mapping[str, float]) -> dict[str, float]:
        """Shares of these languages that sum to 1."""
        return temperature_weights(_sizes(self._num_tokens, num_tokens), self._temperature or 1.0)


class UniMaxWeights:
    """Shares as even as they can be while a run of `budget_tokens` sees no language more than `max_epochs` times."""

    def __init__(
        self,
        *,
        max_epochs: float,
        budget_tokens: float,
        num_tokens: dict[str, float] | str | None = None,
    ):
        """Arguments as `unimax_weights`, and `num_tokens` as TemperatureWeights'."""
        for name, value in (("max_epochs", max_epochs), ("budget_tokens", budget_tokens)):
            if not _is_positive(value):
                raise BadInput(f"{name} must be a positive number, got {value!r}")
        self._max_epochs, self._budget_tokens = max_epochs, budget_tokens
        self._num_tokens = num_tokens

    def __call__(self, num_tokens: Mapping[str, float]) -> dict[str, float]:
        """Shares of these languages that sum to 1."""
        sizes = _sizes(self._num_tokens, num_tokens)
        return unimax_weights(sizes, self._max_epochs, self._budget_tokens)


def _sizes(
    table: dict[str, float] | str | None, num_tokens: Mapping[str, float]
) -> Mapping[str, float]:
    if table is None:
        return num_tokens
    where = table if isinstance(table, str) else "num_tokens"
    return covering(find_table(table) if isinstance(table, str) else table, list(num_tokens), where)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
