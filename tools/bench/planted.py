"""Planted wrong labels: what `vitft.suspects` lists, against cleanlab's `find_label_issues`.

    python tools/bench/planted.py [FOLDER] [--model NAME=WEIGHTS ...] [--quick] [--json FILE]

FOLDER holds class folders (default: the bundled photographs). A tenth of all labels is replaced by
another class at random, five seeds; the features come from a frozen backbone, the bundled ViT-S/14
unless --model names others. Precision and recall of the list are counted against what was planted;
photographs whose own label was wrong before count as false alarms for everyone.

    vitft                   `suspects.find` as a run calls it: copies kept on one side of a fold
    cleanlab, same heads    its default filter on out-of-fold probabilities of vitft's own heads
    cleanlab, its tutorial  the same filter on `cross_val_predict` of scikit-learn's
                            LogisticRegression over the features, five folds

Where a list ends is a choice between precision and recall: vitft names a label from a chance of
three in ten, cleanlab's tutorial lists twice as many, most of them right as they are. So each list
of cleanlab's is also met by the first labels in vitft's order, as many as it has. Goals: precision
and recall at least those of cleanlab on the same heads, and at equal length at least as many of the
planted ones as either way finds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import Row, verdict, write

from vitft import findings, learn, prepare, recipe, relearn, stats, suspects
from vitft.findings import all_features
from vitft.learn import Learned
from vitft.prepare import Prepared

SAMPLE = Path(__file__).resolve().parents[2] / "vitft" / "bundled" / "flowers"
SHARE = 0.1
WAYS = ("vitft", "cleanlab, same heads", "cleanlab, its tutorial")
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Flagged = Callable[[Ints, int], tuple[Mask, Ints | None]]  # labels, seed -> listed, all in order


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--model", action="append", metavar="NAME=WEIGHTS", help="repeatable")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the bundled photographs, one model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    models = args.model or ["vitflower_s14=bundled"]
    folder, models = (SAMPLE, models[:1]) if args.quick else (args.folder, models)
    rows, details = [], {}
    for text in models:
        name, _, weights = text.partition("=")
        found = measure(folder, name, weights or "none", args.seeds)
        details[name] = found
        rows += told(name, found)
    write(args.json, rows, quick=args.quick, details=details)
    return verdict(rows)


def measure(folder: Path, name: str, weights: str, seeds: int) -> dict[str, Any]:
    """Precision, recall and seconds of each way and seed."""
    changes = [f"data.root={folder}", f"model.name={name}", f"model.weights={weights}"]
    base = Path(__file__).resolve().parents[2] / "recipes" / "flowers_probe.yaml"
    p = prepare.prepare(recipe.load(base, changes), fallback=False)
    learned = Learned((), {}, {s: learn.extract(p, s) for s in ("train", "val", "test")}, True)
    why: list[str] = []
    x = all_features(p, learned, why)
    if x is None:
        raise ValueError("; ".join(why))
    truth = np.asarray(p.index.labels)
    found: dict[str, Any] = {"photographs": len(truth), "ways": {way: [] for way in WAYS}}
    print(f"{name}: {len(truth):,} photographs, {SHARE:.0%} of the labels planted, {seeds} seeds")
    for seed in range(seeds):
        labels, order = planted(truth, len(p.index.classes), seed), np.arange(len(truth))
        for way, flagged in ways(p, learned, x).items():
            started = time.monotonic()
            listed, ranked = flagged(labels, seed)
            seconds = time.monotonic() - started
            order = order if ranked is None else ranked
            got = scored(listed, labels != truth)
            as_long = np.isin(np.arange(len(truth)), order[: int(listed.sum())])
            equal = scored(as_long, labels != truth)["recall"]
            found["ways"][way].append(got | {"vitft_as_long": equal, "seconds": seconds})
            shares = f"precision {got['precision']:.3f}  recall {got['recall']:.3f}"
            print(f"  seed {seed}  {way:<24} {shares}  {seconds:6.1f} s", flush=True)
    for way, results in found["ways"].items():
        p_, r_ = (column(results, key) for key in ("precision", "recall"))
        cost = statistics.median(r["seconds"] for r in results)
        print(f"  mean    {way:<24} precision {p_:.3f}  recall {r_:.3f}  {cost:6.1f} s", flush=True)
    return found


def planted(truth: Ints, classes: int, seed: int) -> Ints:
    """A tenth of the labels, chosen at random, replaced by another class at random."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(truth))[: round(SHARE * len(truth))]
    labels = truth.copy()
    labels[chosen] = (truth[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return labels


def ways(p: Prepared, learned: Learned, x: NDArray[np.float32]) -> dict[str, Flagged]:
    """Each way as a function of labels and seed."""
    from cleanlab.filter import find_label_issues
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    classes, fit = len(p.index.classes), relearn.head_fit(p, learned)
    groups = list(findings.copies(p, x).group)

    def ours(labels: Ints, seed: int) -> tuple[Mask, Ints]:
        found = suspects.find(x, labels, fit=fit, classes=classes, groups=groups, seed=seed)
        listed = np.isin(np.arange(len(labels)), found.rows)
        return listed, np.lexsort((-found.wrong, ~listed))

    def same_heads(labels: Ints, seed: int) -> tuple[Mask, None]:
        fold = suspects.split(labels, np.unique(groups, return_inverse=True)[1], folds=5, seed=seed)
        use = np.ones(len(labels), bool)
        logits = suspects.out_of_fold(x, labels, fold, use, fit=fit, classes=classes)
        return np.asarray(find_label_issues(labels, stats.softmax(logits), n_jobs=1)), None

    def tutorial(labels: Ints, seed: int) -> tuple[Mask, None]:
        head = LogisticRegression(max_iter=1000)
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        probs = cross_val_predict(head, x, labels, cv=folds, method="predict_proba")
        return np.asarray(find_label_issues(labels, probs, n_jobs=1)), None

    return dict(zip(WAYS, (ours, same_heads, tutorial), strict=True))


def scored(listed: Mask, wrong: Mask) -> dict[str, float]:
    hits = int((listed & wrong).sum())
    return {
        "listed": int(listed.sum()),
        "precision": hits / max(1, int(listed.sum())),
        "recall": hits / int(wrong.sum()),
    }


def column(results: list[dict[str, float]], key: str) -> float:
    return statistics.fmean(r[key] for r in results)


def told(name: str, found: dict[str, Any]) -> list[Row]:
    """Precision and recall against the same heads, and recall at each list's own length."""
    rows, ways = [], found["ways"]
    for key in ("recall", "precision"):
        what = f"{key} of the labels listed as wrong, a tenth planted, {name} features, against "
        what += "cleanlab on the same heads"
        rows.append(_row(what, [r[key] for r in ways["vitft"]], column(ways[WAYS[1]], key)))
    for way in WAYS[1:]:
        size = column(ways[way], "listed")
        what = f"planted labels among the first {size:.0f}, {name} features, against {way}, whose "
        what += "list is as long"
        found_here = [r["vitft_as_long"] for r in ways[way]]
        rows.append(_row(what, found_here, column(ways[way], "recall")))
    return rows


def _row(what: str, single: list[float], goal: float) -> Row:
    """Means and spread in percent."""
    each = [100 * v for v in single]
    mean, spread = round(statistics.fmean(each), 1), (min(each), max(each))
    return Row(what, mean, "%", spread, goal=round(100 * goal, 1))


if __name__ == "__main__":
    sys.exit(main())
