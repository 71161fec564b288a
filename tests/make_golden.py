"""Writes the files that later versions must still read; run once for each new format.

    python tests/make_golden.py

They lie in tests/golden/: a product and a checkpoint of each format ever released, by number.
"""

import json
from pathlib import Path

import torch
from rows import COLOURS, make_product
from rows import network as product_network
from test_train import network, trainer

from vitft import card, checkpoint, io
from vitft.train import Stopped

GOLDEN = Path(__file__).with_name("golden")
PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
UPDATES = 4


def main() -> None:
    made = make_product(GOLDEN / f"model-{card.FORMAT}")
    with torch.inference_mode():
        logits = product_network()(PICTURE)[0].tolist()
    said = {"logits": logits, "classes": COLOURS}
    made.with_name(f"{made.name}.json").write_text(json.dumps(said) + "\n")

    folder = GOLDEN / f"checkpoint-{checkpoint.FORMAT}"
    io.remove(folder)
    polls = iter([None] * (UPDATES - 1) + [15])

    def save(snapshot: checkpoint.Snapshot) -> None:
        checkpoint.save(folder, snapshot, identity={"classes": ["a", "b"], "train.lr": 0.05})

    try:
        trainer(network(), save=save, stop=lambda: next(polls)).fit()
    except Stopped:
        return


if __name__ == "__main__":
    main()
