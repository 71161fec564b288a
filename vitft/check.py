"""The preflight alone: everything wrong with data, a recipe or a model, found and said at once.

    python -m vitft.check DATA    [--deep] [--strict] [--out DIR]   a folder or a CSV
    python -m vitft.check RECIPE  [key.sub=value ...]               its data and its model as well
    python -m vitft.check MODEL                                     a run, its model/, or weights

Prints the ledger; exits with 0 when a run could start, else with the code of what is wrong. Only
bad files make it write anything: `bad_images.csv`, never below the data.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitft import (
    card,
    console,
    data,
    io,
    model,
    offline,
    prepare,
    product,
    recipe,
    weights,
)
from vitft.console import say, warn
from vitft.errors import DataError, Fault, RecipeError, VitftError, escape
from vitft.ledger import Ledger
from vitft.recipe import DataSpec, Recipe

RECIPES = (".yaml", ".yml")
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt")
SECONDS = 5.0  # for one file; a run is more patient
COLUMNS = ("path", "id", "text", "fix")


@dataclass(frozen=True)
class Options:
    """How to look.

    Attributes:
        deep: Ask the format's library for silent damage too.
        strict: A single bad or damaged file is an error.
        out: Where `bad_images.csv` goes; None: `runs/check-<time>` below the current folder.
    """

    deep: bool = False
    strict: bool = False
    out: Path | None = None


def check(
    target: Path | str, options: Options = Options(), overrides: Sequence[str] = ()
) -> list[str]:
    """Looks at whatever the target is.

    Args:
        target: A folder, CSV, `sample:flowers`, recipe, run folder or weights file.
        options: How to look.
        overrides: `key.sub=value` for a recipe.

    Returns:
        What was found, one line each.

    Raises:
        VitftError: With every fault found; the class is that of the first.
    """
    path = Path(target)
    if path.suffix.lower() in RECIPES:
        return check_recipe(path, options, overrides)
    if overrides:
        text = f"{overrides[0]!r} changes a recipe, and {path} is none"
        raise RecipeError.of("cli.not_a_recipe", overrides[0], text, "name a .yaml file")
    if is_model(path):
        return check_model(path)
    spec = DataSpec(root=str(offline.data_root(str(target))))
    return check_data(spec, options, seed=0).lines()


def is_model(path: Path) -> bool:
    """Whether a path names weights: a file by its suffix, a folder by what it holds."""
    if path.suffix.lower() in WEIGHTS and not path.is_dir():
        return True
    return any((path / p).is_file() for p in ("model.safetensors", "model/model.safetensors"))


def check_data(spec: DataSpec, options: Options, *, seed: int) -> Ledger:
    """Scans and returns the ledger; bad files are listed in `bad_images.csv`.

    Raises:
        DataError: As `data.scan`; with `strict` also for any bad or damaged file.
        RecipeError: `cli.out_in_data`.
    """
    if options.out is not None:
        io.require_outside(options.out, _owned(spec))
    if options.strict:
        spec = spec.model_copy(update={"on_bad": "error"})
    try:
        ledger = data.scan(spec, seed=seed, deep=options.deep, seconds=SECONDS).ledger
    except DataError as error:
        _write(spec, options, [f for f in error.faults if _is_file(spec, f)])
        raise
    damaged = list(_damaged(spec, ledger))
    refused = [Fault(r.id, str(_folder(spec) / r.path), r.text, r.fix) for r in ledger.refused]
    _write(spec, options, [*refused, *damaged])
    if damaged and options.strict:
        raise DataError(damaged)
    return ledger


def check_recipe(path: Path, options: Options, overrides: Sequence[str] = ()) -> list[str]:
    """Checks the recipe's keys, then device, data and model, and reports all their faults together.

    Raises:
        VitftError: As above; a recipe that cannot be read ends the check at once.
    """
    settled = offline.settle(recipe.load(path, overrides))
    for text in settled.warnings:
        warn(text)
    spec = settled.recipe
    lines: list[str] = []
    errors: list[VitftError] = []
    for step in (_check_device, _check_photographs, _check_network):
        try:
            lines += step(spec, options)
        except VitftError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])([fault for error in errors for fault in error.faults])
    return lines


def _check_device(spec: Recipe, options: Options) -> list[str]:
    return [f"device: {prepare.pick_device(spec.device)}"]


def _check_photographs(spec: Recipe, options: Options) -> list[str]:
    root = offline.data_root(spec.data.root)
    placed = spec.data.model_copy(update={"root": str(root)})
    return check_data(placed, options, seed=spec.seed).lines()


def _check_network(spec: Recipe, options: Options) -> list[str]:
    """Builds the model; the head's size plays no part in what can be wrong."""
    built = model.build(spec.model, classes=2, image_size=spec.data.image_size, seed=spec.seed)
    count = sum(p.numel() for p in built.net.parameters())
    size = " x ".join(map(str, built.input.size))
    source = f"{built.report.loaded:,} tensors from {built.report.source}"
    return [f"model: {spec.model.name}, {count:,} parameters, {source}, input {size}"]


def check_model(path: Path) -> list[str]:
    """Reads a model as `predict` would, or a bare weights file.

    Raises:
        WeightsError: Not weights, damaged, would run code, not finite, or not what it says it is.
    """
    file = product.find_file(path)
    if card.KEY not in weights.read_metadata(file):
        found = weights.open_file(file)
        count = sum(t.numel() for t in found.tensors.values())
        size = f"{len(found.tensors):,} tensors, {count:,} numbers, all finite"
        return [f"{file}: {found.kind}, {size}", f"sha256 {found.sha256}", *found.notes]
    net, own = product.load(path)
    count = sum(p.numel() for p in net.parameters())
    return [
        f"{file}: {own.architecture}, {count:,} parameters, all finite, fitting its own card",
        f"{len(own.classes):,} classes: {escape(', '.join(own.classes[:10]))}",
        f"sha256 {io.sha256_file(file)}",
    ]


# ---- bad_images.csv -----------------------------------------------------------------------------


def _folder(spec: DataSpec) -> Path:
    """What the paths of the data are relative to."""
    root = Path(spec.root)
    return root.parent if root.suffix.lower() == ".csv" else root


def _prefix(spec: DataSpec) -> str:
    """What stands before relative paths in the places of faults."""
    folder = _folder(spec)
    return "" if folder == Path() else f"{folder}{os.sep}"


def _is_file(spec: DataSpec, fault: Fault) -> bool:
    return fault.place.startswith(_prefix(spec)) and fault.place != str(_folder(spec))


def _damaged(spec: DataSpec, ledger: Ledger) -> Iterator[Fault]:
    for path, text in ledger.damaged:
        place = str(_folder(spec) / path)
        yield Fault("data.damaged", place, f"decodes, but: {text}", "look at it; copy it again")


def _owned(spec: DataSpec) -> tuple[Path, ...]:
    """Where nothing may be written; a CSV only names files and owns no folder."""
    root = Path(spec.root)
    return (root,) if root.is_dir() else ()


def _write(spec: DataSpec, options: Options, faults: Sequence[Fault]) -> None:
    """Writes the list, if there is one or a place for it was named."""
    if not faults and options.out is None:
        return
    folder = options.out or Path("runs") / time.strftime("check-%Y%m%d-%H%M%S")
    if any(io.lies_in(folder, root) for root in _owned(spec)):
        warn("bad_images.csv is not written: the current folder lies in the data; name --out DIR")
        return
    rows = [(f.place.removeprefix(_prefix(spec)), f.id, f.text, f.fix) for f in faults]
    io.write_csv(folder / "bad_images.csv", COLUMNS, rows)
    say(f"{len(rows):,} bad file{'s' * (len(rows) != 1)}, listed in {folder / 'bad_images.csv'}")


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.check`."""
    p = argparse.ArgumentParser(
        prog="vitft check",
        description="Looks for everything wrong with data, a recipe or a model, and stops.",
        epilog="example: python -m vitft.check photos/ --deep",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("target", metavar="DATA|RECIPE|MODEL", help="folder, CSV, YAML, run or weights")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to a recipe")
    p.add_argument("--deep", action="store_true", help="find silent damage too (slower)")
    p.add_argument("--strict", action="store_true", help="one bad file is an error")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for bad_images.csv")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the ledger goes to stdout, all else to stderr."""
    args = parser().parse_intermixed_args(argv)
    console.setup()
    options = Options(deep=args.deep, strict=args.strict, out=args.out)
    for line in check(args.target, options, args.overrides):
        print(line)  # noqa: T201
    return 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
