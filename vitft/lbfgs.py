"""Logistic heads for every strength of a grid at once, by preconditioned L-BFGS over lanes.

In: a `Task` and strengths, ascending. Out: one solution per strength.

In the eigenbasis of the features' correlations the curvature of the loss is close to (class
curvature x eigenvalue), so L-BFGS preconditioned with that needs few steps where plain L-BFGS needs
hundreds. Every fourth strength is solved first, from weak to strong, each from the parabola along
log C through the three before it; then, halving the spacing, those between start from cubic
interpolation. All strengths between are lanes of one solve: one matrix product evaluates all of
them, and a lane leaves when it is done. Strong heads are where the time goes, and starting them
from their weaker neighbours rather than from zero halves the evaluations, or better: 624 for 4,085
on 3,458 x 1,280 features of flowers, 347 for 537 on 12,500 x 192 x 25 synthetic ones.

Letters: see `eigenbasis`; S strengths, K = C' * R.

Source: D. C. Liu, J. Nocedal, On the limited memory BFGS method, 1989 (two-loop recursion).
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.eigenbasis import Task

MEMORY = 10  # pairs of L-BFGS
WINDOW = 10  # steps over which progress is judged
ARMIJO = 1e-4
NOISE = 2e-7  # relative rounding error of a float32 objective
SHORTEST = 1e-6  # step below which a lane cannot move in float32
STRIDE = 4  # of the strengths that are solved one after the other
LANE_BYTES = 256 * 2**20  # of L-BFGS memory at a time


def solve_path(
    task: Task, grid: NDArray[np.float64], tol: float, max_iter: int
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
        self, task: Task, start: Tensor, ridge: NDArray[np.float64], tol: float, max_iter: int
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
