"""Finished runs -> mean accuracy over splits, for README's table.

    python tools/bench/accuracy.py RUN [RUN ...] [--json FILE]

Each RUN is a folder that `vitft.run` left. Runs of one model, mode and transform that differ in the
seed alone (another split, another head) are one row: mean, least and most of their test accuracies.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from record import Row, write


def main() -> int:
    """Prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows: dict[tuple[str, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in args.runs:
        key, seed, record = read(run)
        rows[key][seed] = record
    table = [row(key, seeds) for key, seeds in sorted(rows.items())]
    for r in table:
        print(
            f"{r['model']:<24} {r['mode']:<6} {r['transform']:<9} {100 * r['mean']:.1f} % "
            f"({100 * r['least']:.1f} to {100 * r['most']:.1f}), seeds {list(r['seeds'])}"
        )
    write(args.json, [told(r) for r in table], details={"table": table})
    return 0


def read(run: Path) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    """What one run was, and what it reached."""
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text("utf-8"))
    env = json.loads((run / "env.json").read_text("utf-8"))
    key = (recipe["model"]["name"], recipe["mode"], recipe["data"]["transform"])
    record = {
        "accuracy": metrics["test"]["accuracy"],
        "n": metrics["test"]["n"],
        "data_sha256": metrics["data_sha256"],
        "weights_sha256": metrics["weights"]["sha256"],
        "torch": env["versions"]["torch"],
        "date": run.name[:8],
    }
    return key, int(recipe["seed"]), record


def row(key: tuple[str, ...], seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    reached = [record["accuracy"] for record in seeds.values()]
    return {
        "model": key[0],
        "mode": key[1],
        "transform": key[2],
        "mean": sum(reached) / len(reached),
        "least": min(reached),
        "most": max(reached),
        "seeds": {str(seed): seeds[seed] for seed in sorted(seeds)},
    }


def told(r: dict[str, Any]) -> Row:
    """One row as README shows it."""
    n = max(int(record["n"]) for record in r["seeds"].values())
    what = f"test accuracy, {r['model']}, mode {r['mode']}: mean of {len(r['seeds'])} splits"
    spread = 100 * r["least"], 100 * r["most"]
    return Row(f"{what}, {n} photographs each", 100 * r["mean"], "%", spread)


if __name__ == "__main__":
    raise SystemExit(main())
