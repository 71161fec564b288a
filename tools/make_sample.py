"""Makes `vitft/bundled/flowers`: a small sample of real photographs, with credits.

    python tools/make_sample.py PATH/TO/flowers

Takes five class folders named after their Flickr photo (`<photo id>_<secret>[_m|_n].jpg`), draws 50
photographs of each class with a fixed seed, leaves out any whose bytes stand in two classes, and
writes them as JPEG (short side 256, quality 82), the class folders unchanged, and `CREDITS.csv`.
The photographs of TensorFlow's `flower_photos` set are published under CC BY 2.0.
"""

import argparse
import csv
import hashlib
import random
from pathlib import Path

from PIL import Image

EACH, SIDE, QUALITY, SEED = 50, 256, 82, 2026
TARGET = Path(__file__).resolve().parents[1] / "vitft" / "bundled" / "flowers"


def main() -> None:
    """Draws, shrinks, writes, credits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    source = parser.parse_args().source
    credits = []
    for path in draw(source):
        target = TARGET / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shrink(path, target)
        photo = path.stem.split("_")[0]
        credits.append((f"{path.parent.name}/{path.name}", photo, address(photo)))
    with TARGET.with_name("CREDITS.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "flickr_photo_id", "address"))
        writer.writerows(credits)
    print(f"{len(credits)} photographs in {TARGET}")


def draw(source: Path) -> list[Path]:
    """50 per class; a photograph that stands in two classes, or twice in one, is never drawn."""
    files = sorted(source.glob("*/*.jpg"))
    seen: dict[str, list[Path]] = {}
    for path in files:
        seen.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(path)
    names: dict[str, list[Path]] = {}
    for path in files:
        names.setdefault(path.name, []).append(path)
    single = {p for group in seen.values() if len(group) == 1 for p in group}
    single &= {p for group in names.values() if len(group) == 1 for p in group}
    rng = random.Random(SEED)
    drawn = []
    for folder in sorted({p.parent for p in files}):
        pool = [p for p in files if p.parent == folder and p in single]
        drawn += sorted(rng.sample(pool, EACH))
    return drawn


def shrink(path: Path, target: Path) -> None:
    """Short side 256, nothing cropped, no metadata."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(target, quality=QUALITY, optimize=True)


def address(photo: str) -> str:
    """Where the photograph and its author are found."""
    return f"https://www.flickr.com/photo.gne?id={photo}"


if __name__ == "__main__":
    main()
