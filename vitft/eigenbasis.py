"""Features for a linear head: checked, standardised, and turned to the axes of their correlations.

In: rows [N, D] and their classes. Out: a `Task`, which knows the loss of many heads at once and its
derivatives, scores them, and folds a head over its basis into one over the features as they came.

N photographs, D features, C classes of which C' have rows, L lanes (heads that are computed
together), R coordinates: eigenvectors and a one.
"""

from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitft.errors import DataError

CONSTANT = 1e-6  # deviation over magnitude, below which a float32 feature holds rounding only
NULL = 1e-10  # eigenvalue over the largest, below which fewer rows than features span nothing
ABSENT = -1e4  # bias of a class without training photographs: never named, exports as float16

Floats = NDArray[np.float32]
Labelled = tuple[Floats, NDArray[np.int64]]
Device = torch.device | str


def joined(train: Labelled, val: Labelled) -> Labelled:
    """The rows of both, train first."""
    return np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])


def checked(x: ArrayLike, y: ArrayLike, classes: int) -> Labelled:
    """Rows [N, D] float32 and labels [N] int64, of which every value can be computed with.

    Raises:
        DataError: `features.nonfinite`.
        ValueError: Shapes or labels are impossible.
    """
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


class Task:
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
