"""Linear classifiers on features, solved rather than trained: arrays in, one folded head out.

    logistic_path   multinomial logistic regression, for every strength of a grid at once
    ridge_path      least squares on one-hot targets, every strength from one eigendecomposition

Strength is scikit-learn's C: the logistic objective is C * sum_i loss_i + |W|^2 / 2, the bias is
free, and two classes are one sigmoid. Each feature is standardised (`eigenbasis`); the strength is
chosen on val; the scaler is folded into the weights, so that they apply to the features as they
came. `lbfgs` solves the path.

N photographs, M of val, D features, C classes.

Source: the grid of DINOv2's evaluation, M. Oquab et al., arXiv 2304.07193.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitft.eigenbasis import Device, Floats, Task, checked, joined
from vitft.lbfgs import solve_path
from vitft.schema import STRENGTHS


@dataclass(frozen=True)
class Probe:
    """A solved linear head.

    Attributes:
        weight: [C, D] float32; logits = x @ weight.T + bias, x not standardised.
        bias: [C] float32.
        strength: The one that val chose.
        table: One record per strength, ascending: strength, val_accuracy, val_loss; of the logistic
            path also objective (scikit-learn's, of the train rows) and iterations.
    """

    weight: Floats
    bias: Floats
    strength: float
    table: tuple[dict[str, Any], ...]


def logistic_path(
    x: ArrayLike,
    y: ArrayLike,
    x_val: ArrayLike,
    y_val: ArrayLike,
    *,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    tol: float = 1e-6,
    max_iter: int = 1000,
    refit: bool = False,
    device: Device = "cpu",
) -> Probe:
    """Logistic regression for every strength; the one with the lowest log loss on val is kept.

    Ties go to the better accuracy on val, then to the smaller strength. Results are equal to the
    bit on one machine with an equal number of threads.

    Args:
        x: [N, D] float32.
        y: [N] int, each in [0, C). A class without rows is never predicted.
        x_val: [M, D] float32, M >= 1.
        y_val: [M] int, each in [0, C).
        classes: C.
        strengths: scikit-learn's C, each above 0.
        tol: Of the objective, relative: a solve ends when the decrease still predicted is below a
            thirtieth of it, or ten steps together won less than five times it.
        max_iter: Steps after which a solve ends anyway.
        refit: Solve the chosen strength again on train and val together.
        device: Where it is solved.

    Raises:
        DataError: A feature is not finite, or all rows are of one class.
        ValueError: Shapes or labels are impossible.
    """
    train, val = checked(x, y, classes), checked(x_val, y_val, classes)
    grid = np.unique(np.asarray(strengths, dtype=np.float64))
    task = Task(*train, classes, device)
    w, steps, objective = solve_path(task, grid, tol, max_iter)
    table = [
        {"strength": float(c), **scores, "objective": float(f), "iterations": int(k)}
        for c, scores, f, k in zip(grid, task.scores(w, *val), objective, steps, strict=True)
    ]
    best = _best(table, by_loss=True)
    chosen = task, w[best]
    if refit:
        both = Task(*joined(train, val), classes, device)
        chosen = both, solve_path(both, grid[best : best + 1], tol, max_iter)[0][0]
    return Probe(*chosen[0].fold(chosen[1]), table[best]["strength"], tuple(table))


def ridge_path(
    x: ArrayLike,
    y: ArrayLike,
    x_val: ArrayLike,
    y_val: ArrayLike,
    *,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    tol: float = 0.0,
    max_iter: int = 1,
    refit: bool = False,
    device: Device = "cpu",
) -> Probe:
    """Least squares on one-hot targets, C * |y - x W|^2 / 2 + |W|^2 / 2, for every strength.

    The logits are estimates of the targets, near 0 and 1, so that their log loss says little before
    a temperature is fitted. Arguments as in `logistic_path`; `tol` and `max_iter` are not needed,
    since the solution is exact, and are there so that both paths are called alike.
    """
    del tol, max_iter
    train, val = checked(x, y, classes), checked(x_val, y_val, classes)
    grid = np.unique(np.asarray(strengths, dtype=np.float64))
    task = Task(*train, classes, device)
    w = _ridge(task, grid)
    scored = task.scores(w, *val)
    table = [{"strength": float(c), **s} for c, s in zip(grid, scored, strict=True)]
    best = _best(table, by_loss=False)
    chosen = task, w[best]
    if refit:
        both = Task(*joined(train, val), classes, device)
        chosen = both, _ridge(both, grid[best : best + 1])[0]
    return Probe(*chosen[0].fold(chosen[1]), table[best]["strength"], tuple(table))


def _ridge(task: Task, grid: NDArray[np.float64]) -> Tensor:
    """Solutions [L, C', R]; in the eigenbasis each coordinate is a division."""
    n, classes = len(task.y), len(task.present)
    target = F.one_hot(task.y, classes).float()
    moment = (target - target.mean(0)).T @ task.z[:, :-1]  # [C', R - 1]
    c = torch.as_tensor(grid, device=task.device)[:, None, None]
    w = c * moment / (c * n * task.spread[:-1].double() + 1)
    bias = target.double().mean(0)[:, None].expand(len(grid), -1, 1)
    return torch.cat([w, bias], dim=2).float()


def _best(table: Sequence[dict[str, Any]], *, by_loss: bool) -> int:
    """The row that val chooses; ties go to the smaller strength.

    Accuracy moves in steps of one photograph and is level over decades of strength; the log loss is
    not. On flowers (EfficientNet-Lite0, five splits) the loss chose heads 0.5 points better on
    test, 90.2 against 89.7 %. Logits that are no log-odds (ridge) must go by accuracy.
    """

    def rank(i: int) -> tuple[float, float, int]:
        loss, accuracy = table[i]["val_loss"], -table[i]["val_accuracy"]
        return (loss, accuracy, i) if by_loss else (accuracy, loss, i)

    return min(range(len(table)), key=rank)
