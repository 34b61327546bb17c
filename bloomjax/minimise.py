"""Minimises one smooth function from many starts at once, in numpy: what fits with thousands of starts need."""

from collections.abc import Callable

import numpy as np

# points [n, k], weights [n or 1, runs] -> values [n], gradients [n, k]
Function = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def minimise_all(
    function: Function,
    starts: np.ndarray,
    weights_of: Callable[[np.ndarray], np.ndarray],
    max_iterations: int = 500,
    tolerance: float = 1e-11,
) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, k] and values [n] where each start ended; all starts move together.

    BFGS with backtracking: for k of five, the full matrix is no larger than what L-BFGS keeps, and forgets nothing.
    A start is done when an iteration lowers its value by less than `tolerance` of it, or the gradient is nil.

    weights_of: given the numbers of the starts still under way, the weights the function gets for them.
    """
    points = np.array(starts, np.float64)
    num, size = points.shape
    everyone = np.arange(num)
    values, gradients = function(points, weights_of(everyone))
    inverse = np.tile(np.eye(size), (num, 1, 1))
    inverse /= np.maximum(np.linalg.norm(gradients, axis=1), 1e-3)[:, None, None] * 10
    is_scaled = np.zeros(num, bool)
    active = everyone
    for _ in range(max_iterations):
        if not len(active):
            break
        x, value, gradient = points[active], values[active], gradients[active]
        direction = -np.einsum("nij,nj->ni", inverse[active], gradient)
        slope = np.sum(direction * gradient, 1)
        uphill = slope >= 0
        direction[uphill] = -gradient[uphill]
        slope[uphill] = -np.sum(gradient[uphill] ** 2, 1)
        inverse[active[uphill]] = np.eye(size)
        new, new_value, new_gradient = _search(
            function, weights_of, active, x, value, gradient, direction, slope
        )
        points[active], values[active], gradients[active] = new, new_value, new_gradient
        _update(inverse, is_scaled, active, new - x, new_gradient - gradient)
        gain = value - new_value
        done = gain <= tolerance * np.abs(value) + 1e-15
        done |= np.abs(new_gradient).max(1) < 1e-12
        active = active[~done]
    return points, values


def _search(
    function: Function,
    weights_of: Callable[[np.ndarray], np.ndarray],
    active: np.ndarray,
    x: np.ndarray,
    value: np.ndarray,
    gradient: np.ndarray,
    direction: np.ndarray,
    slope: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A step down for each start: halves until the value falls enough; who finds none stays."""
    # No coordinate moves by more than 2 at once: they are logarithms and exponents.
    step = np.minimum(1.0, 2.0 / np.maximum(np.abs(direction).max(1), 1e-300))
    new, new_value, new_gradient = x.copy(), value.copy(), gradient.copy()
    todo = np.arange(len(active))
    for _ in range(25):
        tried = x[todo] + step[todo, None] * direction[todo]
        found, found_gradient = function(tried, weights_of(active[todo]))
        enough = found <= value[todo] + 1e-4 * step[todo] * slope[todo]
        good = todo[enough]
        new[good], new_value[good] = tried[enough], found[enough]
        new_gradient[good] = found_gradient[enough]
        todo = todo[~enough]
        if not len(todo):
            break
        step[todo] *= 0.4
    return new, new_value, new_gradient


def _update(
    inverse: np.ndarray, is_scaled: np.ndarray, active: np.ndarray, s: np.ndarray, y: np.ndarray
) -> None:
    """BFGS update of the inverse Hessians of the starts whose step bent upwards."""
    product = np.sum(s * y, 1)
    bent = product > 1e-12 * np.linalg.norm(s, axis=1) * np.linalg.norm(y, axis=1)
    bent &= product > 0
    # Where it bent downwards there is nothing to learn but that the step was short.
    with np.errstate(over="ignore"):  # of a start that has run away
        inverse[active[~bent]] *= 4.0
    place, s, y, product = active[bent], s[bent], y[bent], product[bent]
    fresh = ~is_scaled[place]
    scale = product[fresh] / np.sum(y[fresh] ** 2, 1)
    inverse[place[fresh]] = np.eye(s.shape[1]) * scale[:, None, None]
    is_scaled[place] = True
    old = inverse[place]
    old_y = np.einsum("nij,nj->ni", old, y)
    rho = 1 / product
    ss = s[:, :, None] * s[:, None, :]
    cross = old_y[:, :, None] * s[:, None, :]
    factor = (1 + rho * np.sum(y * old_y, 1)) * rho
    inverse[place] = (
        old + factor[:, None, None] * ss - rho[:, None, None] * (cross + cross.transpose(0, 2, 1))
    )
