"""A folder of JPEGs to a saved model, cold: vitft against the tutorial's way and scikit-learn's.

    python tools/bench/frozen_end_to_end.py [FOLDER] [--images N] [--quick] [--json FILE]

Each way is a process of its own on the same photographs, the same weights and the same split, from
start to saved model, imports included; the ways take turns within a round. On CPU the model is
ViT-S/14 with the bundled weights, on CUDA ViT-B/16 with random ones: `--model` takes either.

    vitft probe    `python -m vitft.run`, mode probe, empty cache, report and model written
    vitft head     the same, mode head, one plain view
    tutorial       own re-implementation from its description: frozen ViT, batch 8, SGD, random
                   crops, as many worker processes as cores up to 8, a full forward of train and
                   val in every epoch, weights saved
    scikit-learn   features of plain timm (eval transform, batch 32), one LogisticRegression

FOLDER defaults to the 250 bundled photographs; 600 need another one. The tutorial's ten epochs are
told from processes of one and of two epochs: first + 9 x difference.
The `trust` parts of vitft's report are switched off, as no other way has them. Goals: vitft at
least 9 times as fast as ten tutorial epochs (CUDA: 15), and no slower than scikit-learn.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Row, verdict, write

HERE = Path(__file__).resolve()
SAMPLE = HERE.parents[2] / "vitft" / "bundled" / "flowers"
RECIPES = HERE.parents[2] / "recipes"
BUNDLED = HERE.parents[2] / "vitft" / "bundled" / "vit_s14.fp16.safetensors"
TIMM = {"vitflower_s14": "vit_small_patch14_dinov2", "vitflower_b16": "vit_base_patch16_224"}
WORKERS = {"cpu": 0, "cuda": 8}  # of the loader beside scikit-learn: on 2 cores they only cost
GOALS = {"tutorial, 10 epochs": 9.0, "scikit-learn": 1.0}
CUDA_GOALS = GOALS | {"tutorial, 10 epochs": 15.0}
QUICK_GOALS = {"tutorial, 10 epochs": 2.0, "scikit-learn": 0.6}  # starts weigh most, and vary
NO_TRUST = ("calibrate", "suspects", "learning_curve", "audit")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="50 images, one round, no head")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", choices=TIMM, help="default: by device")
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        {"tutorial": tutorial, "sklearn": sklearn}[args.way](args)
        return 0
    args.cuda = _device() == "cuda"
    args.model = args.model or ("vitflower_b16" if args.cuda else "vitflower_s14")
    images, rounds = (50, 1) if args.quick else (args.images, args.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        args.weights = weights(args.model, Path(scratch))
        args.folder = subset(args.folder, Path(scratch) / "photos", images)
        images = sum(1 for _ in args.folder.rglob("*.jpg"))
        times = measure(args, Path(scratch), rounds)
    return show(times, images, rounds, args)


def subset(folder: Path, target: Path, count: int) -> Path:
    """A seeded draw of photographs, spread evenly over the classes."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    for k, source in enumerate(classes):
        files = sorted(source.glob("*.jpg"))
        share = count // len(classes) + (k < count % len(classes))
        (target / source.name).mkdir(parents=True)
        for file in sorted(random.Random(k).sample(files, min(share, len(files)))):
            shutil.copy(file, target / source.name)
    return target


def weights(name: str, scratch: Path) -> Path:
    """The bundled file, or a file of seeded random weights for both our class and timm's."""
    if name == "vitflower_s14":
        return BUNDLED
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model(TIMM[name], num_classes=0)
    save_file(net.state_dict(), scratch / "weights.safetensors")
    return scratch / "weights.safetensors"


def measure(args: argparse.Namespace, scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the ways take turns."""
    times: dict[str, list[float]] = {}
    for k in range(rounds):
        commands = {
            "vitft probe": vitft("flowers_probe", args, scratch / f"p{k}"),
            "vitft head": [*vitft("flowers_head", args, scratch / f"h{k}"), "head.views=1"],
            "scikit-learn": own("sklearn", args),
            "tutorial, 1 epoch": own("tutorial", args, 1),
            "tutorial, 2 epochs": own("tutorial", args, 2),
        }
        if args.quick:  # under a minute, of which each start takes some seconds
            del commands["vitft head"]
        for name, command in commands.items():
            environment = dict(os.environ, VITFT_CACHE=str(scratch / f"cache {name} {k}"))
            started = time.perf_counter()
            subprocess.run(command, check=True, env=environment, capture_output=True, cwd=scratch)
            times.setdefault(name, []).append(time.perf_counter() - started)
            print(f"round {k + 1}: {name} {times[name][-1]:.1f} s", flush=True)
    one, two = times["tutorial, 1 epoch"], times["tutorial, 2 epochs"]
    times["tutorial, 10 epochs"] = [a + 9 * (b - a) for a, b in zip(one, two, strict=True)]
    return times


def vitft(recipe: str, args: argparse.Namespace, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "vitft.run", str(RECIPES / f"{recipe}.yaml")),
        *(f"data.root={args.folder}", f"model.name={args.model}", f"model.weights={args.weights}"),
        *(f"output={output}", "trust.head_seeds=0", "trust.bootstrap=1"),
        *(f"trust.{part}=false" for part in NO_TRUST),
    ]


def own(way: str, args: argparse.Namespace, epochs: int = 1) -> list[str]:
    command = [sys.executable, str(HERE), str(args.folder), "--way", way, "--epochs", str(epochs)]
    return [*command, "--model", args.model, "--weights", str(args.weights)]


def show(times: dict[str, list[float]], images: int, rounds: int, args: argparse.Namespace) -> int:
    """The table and the two ratios; exit code 1 where a goal is missed."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(f"\n{images} photographs, {args.model}, {rounds} rounds; seconds, cold")
    for name, t in times.items():
        spread = f"{min(t):.1f} to {max(t):.1f}"
        ratio = medians[name] / medians["vitft probe"]
        print(f"  {name:<20} {medians[name]:8.1f}  ({spread})  {ratio:6.2f} x")
    ours = [name for name in times if name.startswith("vitft")]
    rows = [told(name, way, times, images, args) for name in ours for way in GOALS]
    what = f"{images} photographs to a saved head, cold"
    rows.append(Row(what, medians["vitft probe"], "s", _span(times["vitft probe"])))
    write(args.json, rows, quick=args.quick, details={"images": images, "seconds": times})
    return verdict(rows)


def told(
    ours: str, theirs: str, times: dict[str, list[float]], images: int, args: argparse.Namespace
) -> Row:
    """A ratio: of medians, its spread over rounds."""
    ratio = statistics.median(times[theirs]) / statistics.median(times[ours])
    rounds = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
    goals = QUICK_GOALS if args.quick else CUDA_GOALS if args.cuda else GOALS
    what = f"{images} photographs to a saved head, cold: {ours}, over {theirs}"
    return Row(what, ratio, spread=_span(rounds), goal=goals[theirs])


def _span(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


# -- the other ways -------------------------------------------------------------------------------


def tutorial(args: argparse.Namespace) -> None:
    """Frozen ViT, a full forward of every photograph in every epoch."""
    import torch
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    device = _device()
    net = _backbone(args, classes=5).to(device)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *end]
    plain = [transforms.Resize(256), transforms.CenterCrop(224), *end]
    train = datasets.ImageFolder(str(args.folder), transforms.Compose(crop))
    val = datasets.ImageFolder(str(args.folder), transforms.Compose(plain))
    held = set(random.Random(0).sample(range(len(train)), k=int(0.2 * len(train))))
    rows = [i for i in range(len(train)) if i not in held]
    how: dict[str, Any] = {"batch_size": 8, "num_workers": min(os.cpu_count() or 1, 8)}
    batches = DataLoader(Subset(train, rows), shuffle=True, pin_memory=device == "cuda", **how)
    checks = DataLoader(Subset(val, sorted(held)), pin_memory=device == "cuda", **how)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(args.epochs):
        net.train()
        for x, y in batches:
            loss: Any = torch.nn.functional.cross_entropy(net(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            right = sum(int((net(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in checks)
        print(f"val accuracy {right / len(held):.3f}")
        with tempfile.TemporaryDirectory() as scratch:
            torch.save(net.state_dict(), Path(scratch) / "model.pth")


def sklearn(args: argparse.Namespace) -> None:
    """Plain timm's features, then one logistic regression."""
    import numpy as np
    import timm
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from torch.utils.data import DataLoader
    from torchvision import datasets

    device = _device()
    net = _backbone(args, classes=0).eval().to(device)
    timm_data: Any = timm.data
    config = timm_data.resolve_model_data_config(net) | {"input_size": (3, 224, 224)}
    images = datasets.ImageFolder(str(args.folder), timm_data.create_transform(**config))
    x, y = [], []
    with torch.inference_mode():
        for pixels, labels in DataLoader(images, batch_size=32, num_workers=WORKERS[device]):
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                x.append(net(pixels.to(device)).float().cpu().numpy())
            y.append(labels.numpy())
    rows, labels = np.concatenate(x), np.concatenate(y)
    test = np.random.default_rng(0).permutation(len(labels)) < 0.15 * len(labels)
    scaler = StandardScaler().fit(rows[~test])
    head = LogisticRegression(C=0.01, max_iter=1000)
    head.fit(scaler.transform(rows[~test]), labels[~test])
    print(f"test accuracy {head.score(scaler.transform(rows[test]), labels[test]):.3f}")
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(Path(scratch) / "head.npz", weight=head.coef_, bias=head.intercept_)


def _backbone(args: argparse.Namespace, classes: int) -> Any:
    """The same weights in timm's own class, resampled to 224 pixels by timm."""
    import timm
    from safetensors.torch import load_file

    net: Any = timm.create_model(TIMM[args.model], img_size=224, num_classes=classes)
    vit: Any = timm.models.vision_transformer
    state = vit.checkpoint_filter_fn(load_file(args.weights), net)
    net.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    return net


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
