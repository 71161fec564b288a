"""A finished run -> which of its training photographs are like a new one.

Likeness is the cosine of what the head reads. The features come from the store where the run left
them, and are computed once where not; the photographs stay where they are.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitft import containers, features, model, offline, product, recipe
from vitft.card import Card
from vitft.console import say, warn
from vitft.errors import VitftError
from vitft.photos import Photos
from vitft.table import read_table

SHA256 = re.compile("[0-9a-f]{64}")
MOST = 2000  # training photographs that are compared, evenly over the split


@dataclass(frozen=True)
class Nearest:
    """Training photographs and their features.

    Attributes:
        files: n photographs.
        labels: n class names.
        unit: [n, D] float32, each row of length 1.
    """

    files: tuple[Path, ...]
    labels: tuple[str, ...]
    unit: NDArray[np.float32]

    def __call__(self, row: NDArray[np.float32], count: int) -> list[tuple[Path, str, float]]:
        """File, class and cosine of the closest to one row of features [D], the closest first."""
        cosine = self.unit @ (row / max(float(np.linalg.norm(row)), 1e-12))
        order = np.argsort(-cosine, kind="stable")[:count]
        return [(self.files[i], self.labels[i], float(cosine[i])) for i in order]


def of_run(path: Path, net: nn.Module, card: Card, device: torch.device) -> Nearest | None:
    """The training photographs behind a model; None, with the reason said, where they are not here.

    Args:
        path: As given to `product.load`.
        net: On `device`.
        card: Of the model.
        device: Where features are computed that are missing.
    """
    run = product.find_file(path).parent.parent
    try:
        spec = recipe.of_run(run)
        rows = _train_rows(run, spec)
    except (OSError, VitftError) as error:
        say(f"no nearest training photographs: {run} is no finished run ({type(error).__name__})")
        return None
    if not rows:
        say("no nearest training photographs: they are not where the run found them")
        return None
    known = {name: k for k, name in enumerate(card.classes)}
    photos = Photos(
        [file for file, _, _ in rows],
        np.array([known.get(label, 0) for _, label, _ in rows], np.int64),
        [sha256 for _, _, sha256 in rows],
        decode=product.decode_of(card),
        transform=product.transform_of(card),
        seed=card.seed,
    )
    try:
        found = features.extract(
            net,
            photos,
            views=1,
            device=device,
            backbone_key=f"{spec.model.name} {model.backbone_fingerprint(net)}",
            dtype=spec.head.feature_dtype,
            precision=spec.head.precision,
            workers=0,
        )
    except VitftError as error:
        warn(f"no nearest training photographs: {error.faults[0].text}")
        return None
    x = found.x[0]
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return Nearest(tuple(f for f, _, _ in rows), tuple(label for _, label, _ in rows), unit)


def _train_rows(run: Path, spec: recipe.Recipe) -> list[tuple[Path, str, str]]:
    """File, label and sha256 of the training photographs that are here."""
    root = offline.base(spec.data.root)
    table = read_table(run / "split.csv", required=("path", "sha256", "label", "split"))
    rows = [
        row for row in table if row.get("split") == "train" and SHA256.fullmatch(row.get("sha256"))
    ]
    if len(rows) > MOST:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, MOST).astype(int)]
    found = ((root / row.get("path"), row.get("label"), row.get("sha256")) for row in rows)
    return [row for row in found if containers.exists(row[0])]
