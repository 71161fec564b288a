"""What every test may use: tiny photographs, a tiny model, the way to the real data, no network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "vitft-cache"))


@pytest.fixture(scope="session")
def flowers() -> Path:
    """The 3,458 real photographs, where they are."""
    folder = SHARED / "data" / "flowers"
    if not folder.is_dir():
        pytest.skip(f"needs the real photographs in {folder}")
    return folder


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder with real pretrained weights, where it is."""
    folder = SHARED / "weights"
    if not folder.is_dir():
        pytest.skip(f"needs the real weights in {folder}")
    return folder


def paint(path: Path, colour: tuple[int, int, int], *, size: int = 40, seed: int = 0) -> Path:
    """Writes a small noisy JPEG of one colour; the class is learnable, no two files are equal."""
    noise = np.random.default_rng(seed).integers(-40, 40, (size, size, 3))
    pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)
    return path


@pytest.fixture
def tiny_photos(tmp_path) -> Path:
    """Three classes of 20 tiny JPEGs: red, green, blue."""
    root = tmp_path / "photos"
    colours = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    for k, (name, colour) in enumerate(colours.items()):
        for i in range(20):
            paint(root / name / f"{name}_{i:02d}.jpg", colour, seed=100 * k + i)
    return root


TINY = """
mode: {mode}
device: cpu
output: {output}
data: {{root: {root}, image_size: 32}}
model:
  name: vitflower_ti16
  weights: none
  options: {{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}
head: {{views: 2}}
train: {{epochs: 2, batch_size: 8, opt: adamw, lr: 3e-3, workers: 0, compile: false}}
trust: {{bootstrap: 50, head_seeds: 0, learning_curve: false}}
"""


@pytest.fixture
def tiny_recipe(tmp_path, tiny_photos):
    """(mode, *overrides) -> a Recipe that runs in about a second on the tiny photographs."""
    from vitft import recipe

    def make(mode: str, *overrides: str) -> recipe.Recipe:
        text = TINY.format(mode=mode, output=tmp_path / "runs", root=tiny_photos)
        return recipe.parse(text, f"tiny_{mode}.yaml", tmp_path, list(overrides))

    return make
