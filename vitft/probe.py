"""Linear classifiers on features, solved rather than trained: arrays in, one folded head out.

    logistic_path   multinomial logistic regression, for every strength of a grid at once
    ridge_path      least squares on one-hot targets, every strength from one eigendecomposition
    knn             weighted nearest neighbours, which no linear head can hold

Strength is scikit-learn's C: the logistic objective is C * sum_i loss_i + |W|^2 / 2, the bias is
free, and two classes are one sigmoid. Each feature is standardised; the strength is chosen on val;
the scaler is folded into the weights, so that they apply to the features as they came.

How the path is solved. In the eigenbasis of the features' correlations the curvature of the loss is
close to (class curvature x eigenvalue), so L-BFGS preconditioned with that needs few steps where
plain L-BFGS needs hundreds. Every fourth strength is solved first, from weak to strong, each from
the parabola along log C through the three before it; then, halving the spacing, those between start
from cubic interpolation. All strengths between are lanes of one solve: one matrix product evaluates
all of them, and a lane leaves when it is done. Strong heads are where the time goes, and starting
them from their weaker neighbours rather than from zero halves the evaluations, or better: 624 for
4,085 on 3,458 x 1,280 features of flowers, 347 for 537 on 12,500 x 192 x 25 synthetic ones.

N photographs, M of val, D features, C classes, L lanes, R coordinates: eigenvectors and a one.

Sources: D. C. Liu, J. Nocedal, On the limited memory BFGS method, 1989 (two-loop recursion); the
grid and neighbours of DINOv2's evaluation, M. Oquab et al., arXiv 2304.07193; neighbours weighted
by temperature, Z. Wu et al., arXiv 1805.01978.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitft.errors import DataError
from vitft.schema import STRENGTHS

CONSTANT = 1e-6  # deviation over magnitude, below which a float32 feature holds rounding only
NULL = 1e-10  # eigenvalue over the largest, below which fewer rows than features span nothing
ABSENT = -1e4  # bias of a class without training photographs: never named, exports as float16
MEMORY = 10  # pairs of L-BFGS
WINDOW = 10  # steps over which progress is judged
ARMIJO = 1e-4
NOISE = 2e-7  # relative rounding error of a float32 objective
SHORTEST = 1e-6  # step below which a lane cannot move in float32
STRIDE = 4  # of the strengths that are solved one after the other
LANE_BYTES = 256 * 2**20  # of L-BFGS memory at a time
KS = (10, 20, 100, 200)
TEMPERATURE = 0.07

Floats = NDArray[np.float32]
Labelled = tuple[Floats, NDArray[np.int64]]
Device = torch.device | str


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
    train, val = _checked(x, y, classes), _checked(x_val, y_val, classes)
    grid = np.unique(np.asarray(strengths, dtype=np.float64))
    task = _Task(*train, classes, device)
    w, steps, objective = _path(task, grid, tol, max_iter)
    table = [
        {"strength": float(c), **scores, "objective": float(f), "iterations": int(k)}
        for c, scores, f, k in zip(grid, task.scores(w, *val), objective, steps, strict=True)
    ]
    best = _best(table, by_loss=True)
    chosen = task, w[best]
    if refit:
        both = _Task(*_joined(train, val), classes, device)
        chosen = both, _path(both, grid[best : best + 1], tol, max_iter)[0][0]
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
    train, val = _checked(x, y, classes), _checked(x_val, y_val, classes)
    grid = np.unique(np.asarray(strengths, dtype=np.float64))
    task = _Task(*train, classes, device)
    w = _ridge(task, grid)
    scored = task.scores(w, *val)
    table = [{"strength": float(c), **s} for c, s in zip(grid, scored, strict=True)]
    best = _best(table, by_loss=False)
    chosen = task, w[best]
    if refit:
        both = _Task(*_joined(train, val), classes, device)
        chosen = both, _ridge(both, grid[best : best + 1])[0]
    return Probe(*chosen[0].fold(chosen[1]), table[best]["strength"], tuple(table))


@dataclass(frozen=True)
class Neighbours:
    """The answer of the nearest neighbours.

    Attributes:
        scores: [M, C] float32, shares of the weighted votes; each row sums to 1.
        k: The number of neighbours with the best accuracy on val; the smaller of equal ones.
        table: One record per k, ascending: k, val_accuracy.
    """

    scores: Floats
    k: int
    table: tuple[dict[str, Any], ...]


def knn(
    x: ArrayLike,
    y: ArrayLike,
    x_val: ArrayLike,
    y_val: ArrayLike,
    others: ArrayLike,
    *,
    classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: Device = "cpu",
) -> Neighbours:
    """Votes of the k nearest rows by cosine, each weighing exp(cosine / temperature).

    Args:
        x: [N, D] float32, the rows that vote.
        y: [N] int, each in [0, C).
        x_val: [M', D] float32, on which k is chosen.
        y_val: [M'] int.
        others: [M, D] float32, the rows to name with the chosen k.
        classes: C.
        ks: Numbers of neighbours to try; above N means all N.
        temperature: Above 0; the smaller, the more the nearest decide.
        device: Where it is computed.
    """
    rows, labels = _checked(x, y, classes)
    val, truth = _checked(x_val, y_val, classes)
    tried = sorted({min(int(k), len(rows)) for k in ks})
    vote = _Votes(rows, labels, classes, temperature, torch.device(device))
    right = [(votes.argmax(1) == truth).mean() for votes in vote(val, tried)]
    best = int(np.argmax(right))
    table = tuple({"k": k, "val_accuracy": float(a)} for k, a in zip(tried, right, strict=True))
    scores = vote(np.asarray(others, dtype=np.float32), [tried[best]])[0]
    return Neighbours(scores, tried[best], table)


class _Votes:
    """Rows and their classes, ready to vote."""

    def __init__(
        self, rows: Floats, labels: NDArray[np.int64], classes: int, t: float, device: torch.device
    ) -> None:
        self.bank = F.normalize(torch.as_tensor(rows, device=device))  # [N, D]
        self.labels = torch.as_tensor(labels, device=device)
        self.classes, self.temperature = classes, t

    def __call__(self, queries: Floats, ks: Sequence[int]) -> list[Floats]:
        """[M, C] shares of the votes, for each k."""
        out: list[list[Floats]] = [[] for _ in ks]
        for part in torch.split(torch.as_tensor(queries, device=self.bank.device), 1024):
            cosine = F.normalize(part) @ self.bank.T  # [m, N]
            near, which = cosine.topk(max(ks), dim=1)
            weight = torch.exp((near - near[:, :1]) / self.temperature)  # [m, k], the first is 1
            for k, votes in zip(ks, out, strict=True):
                total = weight.new_zeros(len(part), self.classes)
                total.scatter_add_(1, self.labels[which[:, :k]], weight[:, :k])
                votes.append((total / total.sum(1, keepdim=True)).cpu().numpy())
        return [np.concatenate(votes) for votes in out]


def _joined(train: Labelled, val: Labelled) -> Labelled:
    return np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])


def _checked(x: ArrayLike, y: ArrayLike, classes: int) -> tuple[Floats, NDArray[np.int64]]:
    rows, labels = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.int64)
    if rows.ndim != 2 or len(rows) != len(labels) or not len(rows):
        raise ValueError(f"a probe needs [N, D] and [N], N >= 1: {rows.shape}, {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}): {labels.min()} to {labels.max()}")
    bad = int((~np.isfinite(rows)).any(axis=1).sum())
    if bad:
        text = f"{bad:,} of {len(rows):,} rows hold a value that is not finite"
        raise DataError.of("features.nonfinite", "features", text, "check the backbone's weights")
    return rows, labels


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


class _Task:
    """Rows in the eigenbasis of their correlations, and what is computed with them.

    Attributes:
        z: [N, R] float32; column r has mean square `spread[r]`, the last column is one.
        y: [N], numbering the classes that have rows.
        spread: [R] float32.
        penalised: [R] float32, 0 for the bias.
        weight_of: What |W|^2 / 2 counts: two classes share one vector, as [-w/2, w/2].
    """

    def __init__(
        self, x: Floats, y: NDArray[np.int64], classes: int, device: torch.device | str
    ) -> None:
        present, named = np.unique(y, return_inverse=True)
        if len(present) < 2:
            text = f"all {len(y):,} training rows are of one class"
            raise DataError.of("probe.one_class", "train", text, "add photographs of another class")
        self.device, self.classes, self.present = torch.device(device), classes, present
        self.y = torch.as_tensor(named, device=self.device)
        self._scale(x)
        self._rotate(torch.as_tensor(x, device=self.device))
        self.penalised = torch.ones(len(self.spread), device=self.device)
        self.penalised[-1] = 0
        self.weight_of = 2.0 if len(present) == 2 else 1.0

    def _scale(self, x: Floats) -> None:
        """A feature that does not vary gets the deviation infinity, hence the weight zero."""
        mean = x.mean(axis=0, dtype=np.float64)
        deviation = x.std(axis=0, dtype=np.float64)
        magnitude = np.abs(mean) + np.abs(x).max(axis=0)
        deviation[deviation <= CONSTANT * magnitude] = np.inf
        self.mean = torch.as_tensor(mean, device=self.device)  # [D] float64
        self.deviation = torch.as_tensor(deviation, device=self.device)  # [D] float64

    def standardised(self, x: Tensor) -> Iterator[Tensor]:
        """Blocks [n, D] float64."""
        for block in torch.split(x, 8192):
            yield (block.double() - self.mean) / self.deviation

    def _rotate(self, x: Tensor) -> None:
        n, d = x.shape
        if n > d:
            products = (b.float() for b in self.standardised(x))
            gram = reduce(torch.add, ((b.T @ b).double() for b in products)) / n
            spread, self.axes = torch.linalg.eigh(gram)  # [D], [D, D]
        else:  # the same from the smaller N x N matrix
            rows = torch.cat(list(self.standardised(x)))
            values, vectors = torch.linalg.eigh(rows @ rows.T / n)
            keep = values > NULL * values[-1]
            spread = values[keep]
            self.axes = rows.T @ vectors[:, keep] / (n * spread).sqrt()
        self.spread = torch.cat([spread.clamp_min(0), spread.new_ones(1)]).float()
        self.z = self.rotated(x)

    def rotated(self, x: Tensor) -> Tensor:
        """[n, D] as they came -> [n, R]."""
        axes = self.axes.float()
        z = torch.cat([b.float() @ axes for b in self.standardised(x)])
        return torch.cat([z, z.new_ones(len(z), 1)], dim=1)

    def fold(self, w: Tensor) -> tuple[Floats, Floats]:
        """[C', R] over the basis -> weight [C, D] and bias [C] over the features as they came."""
        weight = (w[:, :-1].double() @ self.axes.T) / self.deviation  # [C', D]
        bias = w[:, -1].double() - weight @ self.mean
        whole = np.zeros((self.classes, len(self.mean)), dtype=np.float32)
        whole[self.present] = weight.cpu().numpy()
        biases = np.full(self.classes, ABSENT, dtype=np.float32)
        biases[self.present] = bias.cpu().numpy()
        return whole, biases

    def scores(self, w: Tensor, x: Floats, y: NDArray[np.int64]) -> list[dict[str, float]]:
        """Accuracy and log loss of lanes [L, C', R] on rows."""
        truth = torch.as_tensor(y, device=self.device)
        present = torch.as_tensor(self.present, device=self.device)
        right = w.new_zeros(len(w), dtype=torch.int64)
        lost = w.new_zeros(len(w), dtype=torch.float64)
        z = self.rotated(torch.as_tensor(x, device=self.device))
        for rows, named in zip(torch.split(z, 1024), torch.split(truth, 1024), strict=True):
            for lane, head in enumerate(w):
                full = head.new_full((len(rows), self.classes), ABSENT)
                full[:, present] = rows @ head.T
                right[lane] += (full.argmax(1) == named).sum()
                lost[lane] += F.cross_entropy(full.double(), named, reduction="sum")
        return [
            {"val_accuracy": int(r) / len(y), "val_loss": float(f) / len(y)}
            for r, f in zip(right, lost, strict=True)
        ]

    def loss(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of lanes and its derivatives.

        Everything is in terms of e^(z_k - z_max) with the true class apart, so that losses and
        residuals far below float32's resolution of 1 keep their relative accuracy.

        Args:
            w: [L, C', R].

        Returns:
            Mean loss [L] float64, its gradient [L, C', R], and the classes' curvature
            mean_i p_ik (1 - p_ik), [L, C'].
        """
        lanes, classes, width = w.shape
        flat = w.reshape(lanes * classes, width)
        total = w.new_zeros(lanes, dtype=torch.float64)
        gradient, curvature = torch.zeros_like(flat), w.new_zeros(lanes, classes)
        n = len(self.z)
        for rows, named in zip(*self._blocks(lanes * classes), strict=True):
            logits = (flat @ rows.T).view(lanes, classes, len(rows))
            lost, residual = _residual(logits, named)
            total += lost.sum(1, dtype=torch.float64)
            gradient.addmm_(residual.view(len(flat), -1), rows, alpha=1 / n)
            size = residual.abs_()
            curvature += torch.addcmul(size, size, size, value=-1).sum(2)
        return total / n, gradient.view_as(w), curvature / n

    def _blocks(self, columns: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Rows in blocks whose logits stay in the processor's cache, or fill a GPU."""
        budget = 2**18 if self.device.type == "cpu" else 2**26
        rows = max(256, budget // columns)
        return torch.split(self.z, rows), torch.split(self.y, rows)


def _residual(logits: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [L, C, n] -> loss [L, n], and probability minus truth in the logits' place."""
    index = named.expand(len(logits), 1, -1)
    highest = logits.amax(1, keepdim=True)
    behind = highest - logits.gather(1, index)  # [L, 1, n], 0 where the true class leads
    e = logits.sub_(highest).exp_().scatter_(1, index, 0.0)
    own, wrong = torch.exp(-behind), e.sum(1, keepdim=True)
    whole = wrong + own
    lost = behind + torch.log1p(wrong + (own - 1))
    return lost[:, 0], e.div_(whole).scatter_(1, index, -wrong / whole)


def _ridge(task: _Task, grid: NDArray[np.float64]) -> Tensor:
    """Solutions [L, C', R]; in the eigenbasis each coordinate is a division."""
    n, classes = len(task.y), len(task.present)
    target = F.one_hot(task.y, classes).float()
    moment = (target - target.mean(0)).T @ task.z[:, :-1]  # [C', R - 1]
    c = torch.as_tensor(grid, device=task.device)[:, None, None]
    w = c * moment / (c * n * task.spread[:-1].double() + 1)
    bias = target.double().mean(0)[:, None].expand(len(grid), -1, 1)
    return torch.cat([w, bias], dim=2).float()


def _path(
    task: _Task, grid: NDArray[np.float64], tol: float, max_iter: int
) -> tuple[Tensor, NDArray[np.int64], NDArray[np.float64]]:
    """Solutions [S, C', R], steps [S] and scikit-learn's objectives [S] of an ascending grid."""
    shape = len(task.present), len(task.spread)
    w = torch.zeros(len(grid), *shape, device=task.device)
    steps, objective = np.zeros(len(grid), dtype=np.int64), np.zeros(len(grid))
    lanes = max(1, LANE_BYTES // (2 * MEMORY * 4 * shape[0] * shape[1]))
    known: list[int] = []
    for stage in _stages(len(grid)):
        start = [_between(np.log(grid), known, i, w) for i in stage]
        for first in range(0, len(stage), lanes):
            part = stage[first : first + lanes]
            ridge = task.weight_of / (grid[part] * len(task.y))
            solve = _Solve(task, torch.stack(start[first : first + lanes]), ridge, tol, max_iter)
            w[part], steps[part], value = solve.run()
            objective[part] = value * grid[part] * len(task.y)
        known = sorted(known + stage)
    return w, steps, objective


def _stages(n: int) -> Iterator[list[int]]:
    """Positions 0..n-1: coarse ones alone, upwards; then again and again those half way between."""
    coarse = sorted({*range(0, n, STRIDE), n - 1})
    yield from ([i] for i in coarse)
    done, stride = set(coarse), STRIDE // 2
    while stride:
        new = [i for i in range(0, n, stride) if i not in done]
        done.update(new)
        if new:
            yield new
        stride //= 2


def _between(at: NDArray[np.float64], known: list[int], i: int, w: Tensor) -> Tensor:
    """A polynomial through the nearest solutions, at position i; zero where there are none.

    Four of them between two strengths, three beyond the last: a cubic leaps too far there.
    """
    beyond = not known or i > max(known)
    near = sorted(known, key=lambda j: abs(at[j] - at[i]))[: 3 if beyond else 4]
    out = torch.zeros_like(w[i])
    for j in near:
        factor = np.prod([(at[i] - at[k]) / (at[j] - at[k]) for k in near if k != j])
        out += float(factor) * w[j]
    return out


class _Solve:
    """Preconditioned L-BFGS over lanes that move each for itself; [L, K], K = C' * R.

    A lane whose trial point is not low enough halves its step in the next round; the others go on.
    """

    def __init__(
        self, task: _Task, start: Tensor, ridge: NDArray[np.float64], tol: float, max_iter: int
    ) -> None:
        self.task, self.tol, self.max_iter = task, tol, max_iter
        self.shape = start.shape[1:]
        lanes, width = len(start), start[0].numel()
        self.ridge = torch.as_tensor(ridge, device=start.device)
        self.w = start.reshape(lanes, width)
        self.f, self.g, curvature = self._value(self.w)
        self.scale = self._scale(curvature)
        self.gain = torch.ones(lanes, 1, device=start.device)
        self.s = torch.zeros(MEMORY, lanes, width, device=start.device)
        self.y = torch.zeros_like(self.s)
        self.rho = torch.zeros(MEMORY, lanes, device=start.device)
        self.t = torch.ones(lanes, 1, device=start.device)
        self.steps = torch.zeros(lanes, dtype=torch.int64, device=start.device)
        self.past = torch.full((WINDOW, lanes), float("inf"), device=start.device).double()
        self.lane = torch.arange(lanes, device=start.device)
        self.round = 0
        self.d = torch.zeros_like(self.w)
        self._aim(torch.ones(lanes, dtype=torch.bool, device=start.device))

    def run(self) -> tuple[Tensor, NDArray[np.int64], NDArray[np.float64]]:
        """Solutions [L, C', R], steps [L], values [L], in the order the lanes came."""
        lanes = len(self.lane)
        w, f = torch.empty_like(self.w), torch.empty_like(self.f)
        steps = torch.empty_like(self.steps)
        done = self._done(torch.ones_like(self.lane, dtype=torch.bool))
        while True:
            if done.any():
                left = self.lane[done]
                w[left], f[left], steps[left] = self.w[done], self.f[done], self.steps[done]
                self._keep(~done)
            if not len(self.lane):
                break
            done = self._done(self._step())
        return w.view(lanes, *self.shape), steps.cpu().numpy(), f.cpu().numpy()

    def _value(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = w.view(-1, *self.shape)
        mean, gradient, curvature = self.task.loss(w)
        inner = w * self.task.penalised
        ridge = self.ridge[:, None, None]
        size = (inner.double() ** 2).sum((1, 2))
        gradient = gradient + ridge.float() * inner
        return mean + self.ridge * size / 2, gradient.reshape(len(w), -1), curvature

    def _scale(self, curvature: Tensor) -> Tensor:
        """The inverse of the preconditioner, [L, K]."""
        power = curvature[:, :, None] * self.task.spread
        floor = self.ridge.float()[:, None, None] * self.task.penalised
        return 1 / (power + floor).clamp_min(1e-12).flatten(1)

    def _step(self) -> Tensor:
        """Tries one point per lane; [L] whether it was taken."""
        move = self.t * self.d
        trial = self.w + move
        f, g, curvature = self._value(trial)
        enough = self.f + ARMIJO * self.t[:, 0] * self.slope + NOISE * self.f.abs()
        taken: Tensor = f <= enough
        slot = self.round % MEMORY
        change = g - self.g
        along = torch.linalg.vecdot(move, change)
        paired = taken & (along > 0)
        self.s[slot], self.y[slot] = move, change
        self.rho[slot] = torch.where(paired, 1 / along, 0.0)
        self.scale = torch.where(taken[:, None], self._scale(curvature), self.scale)
        stretch = along / torch.linalg.vecdot(change, change * self.scale)
        self.gain = torch.where(paired[:, None], stretch[:, None], self.gain)
        shorter = self._shorter(f)
        self.past.scatter_(0, (self.steps % WINDOW)[None], self.f[None])
        self.w = torch.where(taken[:, None], trial, self.w)
        self.g = torch.where(taken[:, None], g, self.g)
        self.f = torch.where(taken, f, self.f)
        self.t = torch.where(taken[:, None], 1.0, shorter)
        self.steps += taken
        self.round += 1
        self._aim(taken)
        return taken

    def _shorter(self, f: Tensor) -> Tensor:
        """Where the parabola through a trial that was too high has its lowest point, [L, 1]."""
        t, slope = self.t[:, 0], self.slope
        bottom = -slope * t**2 / (2 * (f - self.f - slope * t))
        bottom = torch.nan_to_num(bottom, nan=0.0, posinf=0.0, neginf=0.0)
        kept: Tensor = torch.clamp(bottom, 0.05 * t, 0.5 * t).float()[:, None]
        return kept

    def _aim(self, taken: Tensor) -> None:
        """The two-loop recursion, newest pair first; lanes that only shorten keep their aim."""
        newest_first = [(self.round - 1 - k) % MEMORY for k in range(min(self.round, MEMORY))]
        q, factors = self.g.clone(), {}
        for k in newest_first:
            factors[k] = self.rho[k] * torch.linalg.vecdot(self.s[k], q)
            q.addcmul_(self.y[k], factors[k][:, None], value=-1)
        q *= self.scale * self.gain
        for k in reversed(newest_first):
            factor = factors[k] - self.rho[k] * torch.linalg.vecdot(self.y[k], q)
            q.addcmul_(self.s[k], factor[:, None])
        self.d = torch.where(taken[:, None], -q, self.d) if self.round else -q
        self.slope = torch.linalg.vecdot(self.g.double(), self.d.double())

    def _done(self, taken: Tensor) -> Tensor:
        small = -self.slope / 2 <= self.tol / 30 * self.f
        before = self.past.gather(0, (self.steps % WINDOW)[None])[0]
        slow = before - self.f <= 5 * self.tol * self.f
        stuck = self.t[:, 0] < SHORTEST
        ended: Tensor = (taken & (small | slow | (self.steps >= self.max_iter))) | stuck
        return ended

    def _keep(self, which: Tensor) -> None:
        for name in (
            "ridge",
            "w",
            "f",
            "g",
            "scale",
            "gain",
            "t",
            "steps",
            "lane",
            "d",
            "slope",
        ):
            setattr(self, name, getattr(self, name)[which])
        for name in ("s", "y", "rho", "past"):
            setattr(self, name, getattr(self, name)[:, which])
