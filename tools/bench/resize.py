"""How far ONNX's antialiased resize is from Pillow's, and what that does to a model's answers.

    python tools/bench/resize.py MODEL_OR_RUN FOLDER [--quick] [--json FILE]

Each photograph goes through the model twice: resized by timm's transform (Pillow), and resized by
ONNX's `Resize` (cubic or linear, antialias, coefficient -0.5) to the same size and cropped at the
same place. Only if no probability moved by more than 1e-4 could the resize travel in the graph.
The bundled photographs would show no difference: they have the resized size already.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from record import Row, write

from vitft import images, product, stats
from vitft.evaluate import in_fixed_shape
from vitft.inputs import normalise, pixels

GOAL = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a third of the photographs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = measure(args.model, sorted(args.folder.rglob("*.jpg"))[:: 12 if args.quick else 4])
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    what = "probability moved most by ONNX's resize in place of Pillow's (hence not exported)"
    row = Row(what, found["largest difference of a probability"], "")
    write(args.json, [row], quick=args.quick, details={"limit": GOAL} | found)
    inside = found["largest difference of a probability"] <= GOAL
    print("the resize could travel inside" if inside else "the resize stays with the caller")
    return 0


def measure(model: Path, files: list[Path]) -> dict[str, float]:
    net, card = product.load(model)
    transform, decode = product.transform_of(card), product.decode_of(card)
    ours, session = pixels(transform), resizer(transform.interpolation)
    grey, moved, flipped = [], [], 0
    for file in files:
        picture = images.decode(images.read_bytes(file), file, decode)
        a = ours(picture)  # [3, S, S] uint8
        b = resized(session, np.asarray(picture), transform)
        grey.append(float((a.int() - b.int()).abs().max()))
        with torch.inference_mode():
            logits = in_fixed_shape(net, normalise(torch.stack([a, b]), transform)).numpy()
        p, q = stats.softmax(logits, card.temperature or 1.0)
        moved.append(float(np.abs(p - q).max()))
        flipped += int(p.argmax() != q.argmax())
    return {
        "photographs": len(files),
        "largest difference of a grey value": max(grey),
        "largest difference of a probability": max(moved),
        "median difference of a probability": float(np.median(moved)),
        "answers that changed": flipped,
    }


def resizer(interpolation: str) -> onnxruntime.InferenceSession:
    """float32 [1, 3, H, W], int64 [4] -> [1, 3, h, w]."""
    mode = {"bicubic": "cubic", "bilinear": "linear"}[interpolation]
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"],
        mode=mode, antialias=1, cubic_coeff_a=-0.5, coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "resize",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, None, None]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, None, None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


def resized(
    session: onnxruntime.InferenceSession, picture: NDArray[np.uint8], transform: Any
) -> torch.Tensor:
    """Uint8 [H, W, 3] -> uint8 [3, S, S]: short side to S / crop_pct, centre crop, as timm does."""
    height, width = picture.shape[:2]
    side = transform.size[0]
    short = int(side / transform.crop_pct)
    if height < width:
        h, w = short, int(short * width / height)
    else:
        h, w = int(short * height / width), short
    x = picture.transpose(2, 0, 1)[None].astype(np.float32)
    (y,) = session.run(None, {"x": x, "sizes": np.array([1, 3, h, w])})
    out = torch.from_numpy(y[0]).round().clamp(0, 255).to(torch.uint8)
    top, left = int(round((h - side) / 2)), int(round((w - side) / 2))
    return out[:, top : top + side, left : left + side]


if __name__ == "__main__":
    sys.exit(main())
