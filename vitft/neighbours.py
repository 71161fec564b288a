"""Nearest neighbours on features: weighted votes, which no linear head can hold.

N photographs that vote, M to be named, D features, C classes.

Source: Z. Wu et al., arXiv 1805.01978 (votes weighted by temperature); numbers of neighbours as in
DINOv2's evaluation, M. Oquab et al., arXiv 2304.07193.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from vitft.eigenbasis import Device, Floats, checked

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


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
    rows, labels = checked(x, y, classes)
    val, truth = checked(x_val, y_val, classes)
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
