"""What to run with when weights or data are not to be had: the recipe's visible fallback.

Each part is settled on its own and within seconds. A user's own folder or weights file is never
replaced: only names that need a network (`flower_photos`, a timm tag, `hf-hub:`) can fall back, and
only to what the recipe's `offline:` block says. What was replaced is returned as warnings, for the
console, the report and `metrics.json`; so is what nothing acts on.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vitft import afar, ahead, columns, conflicts, containers, fetch, model
from vitft.addresses import is_far
from vitft.console import say, track
from vitft.errors import DataError, Fault, MachineError
from vitft.recipe import Recipe

SAMPLE = "sample:flowers"
BUNDLED = Path(__file__).with_name("bundled")
PATIENCE = 8.0  # seconds to decide whether a host answers


@dataclass(frozen=True)
class Settled:
    """A recipe that this machine can run, and what its owner should know before it does.

    Attributes:
        recipe: With `model` and `data.root` replaced where they had to be.
        warnings: One sentence per replacement, and per section with keys that nothing acts on.
    """

    recipe: Recipe
    warnings: tuple[str, ...]


def settle(recipe: Recipe, *, fallback: bool = True) -> Settled:
    """Decides, part by part, between what the recipe wants and its offline block.

    Args:
        recipe: As loaded.
        fallback: False (`--no-fallback`) makes a missing part an error.

    Raises:
        MachineError: `env.unreachable` for every part that is missing and may not be replaced,
            naming the file to place and where.
    """
    faults: list[Fault] = []
    warnings: list[str] = []
    changes: dict[str, object] = {}
    with ThreadPoolExecutor(2) as pool:  # both hosts at once: a silent network costs one patience
        weights = pool.submit(_weights_can_be_had, recipe)
        data = pool.submit(_data_can_be_had, recipe.data.root)
    if not weights.result():
        instead = recipe.offline.model
        if fallback and instead is not None:
            stand_in = instead.model_dump() | {"sha256": None, "embed": None}
            changes["model"] = recipe.model.model_copy(update=stand_in)
            warnings.append(
                f"OFFLINE FALLBACK: weights {recipe.model.weights} are neither cached nor "
                f"reachable; "
                f"using {instead.name} with weights {instead.weights} instead"
            )
        else:
            faults.append(_missing_weights(recipe))
    if not data.result():
        substitute = recipe.offline.data
        if fallback and substitute is not None:
            changes["data"] = recipe.data.model_copy(update=substitute.model_dump())
            warnings.append(
                f"OFFLINE FALLBACK: data {recipe.data.root} are neither cached nor reachable; "
                f"using {substitute.root} instead. These numbers are about other photographs"
            )
        else:
            faults.append(_missing_data(recipe))
    if faults:
        raise MachineError(faults)
    settled = recipe.model_copy(update=changes)
    return Settled(settled, (*warnings, *conflicts.idle(settled)))


def data_root(root: str) -> Path:
    """The folder or CSV file behind `data.root`, downloaded or looked up where it must be.

    Raises:
        MachineError: `env.unreachable`.
        RecipeError, DataError: Of an address, as `afar.arrive`.
    """
    if is_far(root):
        return _arrived(root)
    if root == SAMPLE:
        return BUNDLED / "flowers"
    if root in fetch.DATASETS:
        return fetch.dataset(root)
    return Path(root)


def _arrived(root: str) -> Path:
    """Looks files up, and reads their headers several at a time where nobody has before."""
    folder, files = afar.arrive(root)
    size = sum(far.size for far in files)
    say(f"{root}: {len(files):,} files, {size / 1e9:,.2f} GB, read where they lie")
    # a table says at its end what it holds
    stand_ins = sorted(file for file in afar.stand_ins(folder) if not columns.holds(file))

    def look(file: Path) -> None:
        with suppress(DataError):  # said together with all others when they are listed
            containers.members(file)

    with ThreadPoolExecutor(ahead.CONNECTIONS) as pool:
        for _ in track(pool.map(look, stand_ins), len(stand_ins), "shards looked through"):
            pass
    return folder


def base(root: str) -> Path:
    """The folder that the paths of split.csv and predictions.csv are relative to.

    Raises:
        MachineError: As `data_root`.
    """
    if is_far(root) and is_here(root):
        return afar.place(root)
    found = data_root(root)
    return found if found.is_dir() else found.parent


def owned(root: str) -> Path:
    """What `data.root` names, where that is known to be here: no network is touched."""
    return base(root) if is_far(root) else data_root(root)


def is_here(root: str) -> bool:
    """Whether `data.root` can be read without a network."""
    if root == SAMPLE:
        return True
    if is_far(root):
        return afar.place(root).is_dir()
    place = fetch.cached(root) if root in fetch.DATASETS else Path(root)
    return place is not None and os.path.exists(place)  # noqa: PTH110  (False where not allowed)


def _weights_can_be_had(recipe: Recipe) -> bool:
    return model.cached(recipe.model) or fetch.reachable(model.HUB, timeout=PATIENCE)


def _data_can_be_had(root: str) -> bool:
    return root not in fetch.DATASETS or fetch.available(root, PATIENCE)


def _missing_weights(recipe: Recipe) -> Fault:
    spec = model.sources(recipe.model)[-1]  # a hybrid's CNN comes last
    key = "model.weights" if spec == recipe.model else "model.embed.weights"
    return Fault(
        "env.unreachable",
        recipe.place(key),
        f"{spec.weights} is neither in the hub's cache nor is {model.HUB} reachable",
        f"download it elsewhere from https://{model.HUB}/{model.hub_repository(spec)} and "
        f"set {key} to the file, or add an offline.model block",
    )


def _missing_data(recipe: Recipe) -> Fault:
    return Fault(
        "env.unreachable",
        recipe.place("data.root"),
        f"{recipe.data.root} is neither in the cache nor reachable",
        fetch.how_to_place(recipe.data.root) + ", or set data.root to a folder of your own",
    )
