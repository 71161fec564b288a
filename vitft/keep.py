"""What a run keeps so that it can go on after a kill, and the proof that it goes on as itself.

Recipe (as far as it can change the result), photographs, classes and starting weights are compared
key by key before one file of the interrupted run is replaced. A checkpoint that finds the disk full
is tried again later, since the one before it is whole; the third failure in a row ends the run.
"""

import errno
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitft import checkpoint, io, prepare, recipe, tune
from vitft.checkpoint import Snapshot
from vitft.console import say, warn
from vitft.errors import MachineError, RecipeError
from vitft.folders import no_run
from vitft.prepare import Prepared

CHECKPOINTS = "checkpoints"
AT_ONCE = 3  # checkpoints on the disk while one is written: two kept, one under way
TRIES = 3  # saves in a row that may fail
ANEW = "leave out --resume to start anew; cached features are used again"
# Keys whose change leaves the trained weights as they are; data and weights go by their hashes.
HARMLESS = {
    "schema_version", "name", "output", "device", "data.root", "model.weights", "model.sha256",
    "model.embed.weights",
    "train.workers", "train.checkpoint_minutes", "train.pictures_gb", "train.activations_gb",
}  # fmt: skip
HARMLESS_SECTIONS = {"report", "trust", "export", "offline"}


# -- before it starts -----------------------------------------------------------------------------


def require_output(base: Path) -> None:
    """Tries to write where the run folder will be, before photographs are read.

    Raises:
        MachineError: `env.write_failed` or `env.disk_full`.
    """
    for folder in (base, *base.absolute().parents):
        try:
            folder.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            text = f"cannot be written: {error.strerror} ({errno.errorcode[error.errno or 0]})"
            raise MachineError.of("env.write_failed", base, text, "set output elsewhere") from None
        io.require_writable(folder)
        return


def require_room(p: Prepared, base: Path) -> None:
    """Refuses a run whose checkpoints or product would not fit.

    Raises:
        MachineError: `env.disk_full`, with need and free.
    """
    size = _bytes(p.net)
    need = size + AT_ONCE * _checkpoint_size(p) if p.recipe.mode == "full" else size
    io.require_space(base, need)


def _checkpoint_size(p: Prepared) -> int:
    """Of the trained part: itself, its best epoch, the optimizer's moments, perhaps an average."""
    spec, blocks = p.recipe.train, getattr(p.net, "blocks", None)
    trained = _bytes(p.net)
    if spec.tune != "all":
        trained = 4 * tune.planned(p.net, spec)
    elif spec.blocks is not None and blocks is not None:
        trained -= sum(_bytes(block) for block in blocks[: -spec.blocks])
    moments = 1 if spec.opt in ("sgd", "momentum", "nesterov") else 2
    return trained * (2 + moments + (spec.ema is not None))


def _bytes(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


# -- going on -------------------------------------------------------------------------------------


def find(p: Prepared, base: Path) -> Path | None:
    """What `--resume auto` means: the newest run folder with a whole checkpoint and no report.

    The report is written last: what a kill leaves after the final numbers is finished, too.

    Args:
        p: The run as it is asked for now.
        base: Folder of the recipe's runs.

    Returns:
        None where nothing was kept yet, so that one command serves a first start and a job that
        comes back into the queue.

    Raises:
        RecipeError: `run.nothing_to_resume`: this very run is finished, or its checkpoints are
            there and not one of them is whole.
        BusyError: `env.busy`: an unfinished run is under way, whether it has kept something or not.
    """
    folders = sorted(base.glob("2*"), reverse=True)
    open_ones = [folder for folder in folders if not (folder / "report.html").exists()]
    for folder in open_ones:
        io.require_free(folder)
    for folder in open_ones:
        if checkpoint.newest(folder / CHECKPOINTS) is not None:
            return folder
    for folder in open_ones:
        if any((folder / CHECKPOINTS).glob("step-*")):
            raise _nothing(folder, "it has checkpoints, and none of them is whole")
    for folder in folders:
        if folder not in open_ones and _is_the_same(p, folder):
            raise _nothing(folder, "this run is finished, with this recipe and these photographs")
    return None


def _is_the_same(p: Prepared, folder: Path) -> bool:
    """Whether a finished run was of this recipe and these photographs."""
    try:
        text = (folder / "recipe.resolved.yaml").read_text("utf-8")
        seen = io.read_json(folder / "metrics.json").get("data_sha256")
    except (OSError, UnicodeDecodeError, MachineError):
        return False
    return text == recipe.dump(p.recipe) and seen == prepare.data_hash(p.index)


def named(folder: Path) -> Path:
    """A run folder that the reader named.

    Raises:
        RecipeError: `run.nothing_to_resume`: there is no such folder.
    """
    if not folder.is_dir():
        raise _nothing(folder, *no_run(folder, "is no folder", ANEW))
    return folder


def open_newest(p: Prepared, folder: Path, *, anyway: bool) -> Snapshot:
    """The state to go on from; nothing in the folder has changed yet.

    Of several ranks the first one chooses. Each reads the file itself, which saves pickling
    gigabytes of moments through the host's network, and must find the same hashes in it.

    Args:
        p: The run as it is asked for now.
        folder: Of the interrupted run.
        anyway: Go on although recipe, data or classes have changed.

    Raises:
        RecipeError: `run.nothing_to_resume`: finished, or without a whole checkpoint.
        WeightsError: As `vitft.checkpoint.load`.
        MachineError: `env.other_disk`: a rank does not see what the first one sees.
    """
    opened: list[Snapshot] = []

    def choose() -> tuple[Path, str]:
        newest, snapshot = _chosen(p, folder, anyway)
        opened.append(snapshot)
        return newest, io.sha256_file(newest / io.MANIFEST)

    newest, seal = p.ranks.first_does(choose)
    return p.ranks.agreed(lambda: opened[0] if opened else _reread(p, newest, seal, anyway))


def _chosen(p: Prepared, folder: Path, anyway: bool) -> tuple[Path, Snapshot]:
    newest = checkpoint.newest(folder / CHECKPOINTS, _tell_broken)
    if newest is None:
        done = (folder / "report.html").exists()
        raise _nothing(folder, "this run is finished" if done else "no whole checkpoint is here")
    snapshot = checkpoint.load(newest, identity=identity(p), anyway=anyway)
    say(f"resumed from step {snapshot.step} (epoch {snapshot.epoch + 1}, {newest})")
    if snapshot.changed:
        warn("going on although this has changed: " + "; ".join(snapshot.changed))
    for text in _other_machine(folder, prepare.environment(p)):
        warn(f"{text}; the result may differ in its last bits")
    return newest, snapshot


def _reread(p: Prepared, path: Path, seal: str, anyway: bool) -> Snapshot:
    """What the first rank chose, read by another one."""
    manifest = path / io.MANIFEST
    if not manifest.is_file() or io.sha256_file(manifest) != seal:
        text = f"process {p.ranks.rank} does not see the checkpoint that process 0 goes on from"
        fix = "set output to a folder on a disk that all machines see"
        raise MachineError.of("env.other_disk", path, text, fix)
    return checkpoint.load(path, identity=identity(p), anyway=anyway)


def _tell_broken(path: Path, problems: tuple[str, ...]) -> None:
    warn(f"{path} is passed over: {'; '.join(problems[:3])}")


def identity(p: Prepared) -> dict[str, Any]:
    """What must not differ for a resume to make sense, as flat JSON values."""
    keys = _flat(p.recipe.model_dump(mode="json"))
    return {
        **{k: v for k, v in keys if not _is_harmless(k)},
        "data": prepare.data_hash(p.index),
        "weights": p.report.sha256,
        "classes": list(p.index.classes),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and key != "options":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_harmless(key: str) -> bool:
    return key in HARMLESS or key.partition(".")[0] in HARMLESS_SECTIONS


def _other_machine(folder: Path, now: dict[str, Any]) -> Iterator[str]:
    """What is no mistake to change, and can still change the last bits."""
    try:
        then = io.read_json(folder / "env.json")
        for key in ("device", "device_name", "threads", "processes", "versions"):
            if then[key] != now[key]:
                yield f"{key} was {then[key]}, now {now[key]}"
    except (MachineError, KeyError):
        yield "env.json does not say on what machine it began"


def last_good(folder: Path) -> str:
    """One line for who trained away from the finite numbers."""
    newest = checkpoint.newest(folder / CHECKPOINTS)
    if newest is None:
        return "no checkpoint was written yet, and nothing that is not finite was saved"
    words = ("python", "-m", "vitft.run", folder / "recipe.resolved.yaml", "train.lr=...")
    command = shlex.join(map(str, (*words, "--resume", folder, "--resume-anyway")))
    return f"last good checkpoint: {newest}; go on from it with {command}"


def how_to_go_on(folder: Path) -> str:
    """One line for who stopped a run."""
    if checkpoint.newest(folder / CHECKPOINTS) is None:
        return "stopped; there is no checkpoint, but cached features are used again"
    words = ("python", "-m", "vitft.run", folder / "recipe.resolved.yaml", "--resume", folder)
    return f"stopped; go on with: {shlex.join(map(str, words))}"


def _nothing(place: Path, text: str, fix: str = ANEW) -> Exception:
    return RecipeError.of("run.nothing_to_resume", place, text, fix)


# -- while it runs --------------------------------------------------------------------------------


@dataclass
class Keeper:
    """Saves a run's checkpoints, patient with a disk that is full for a while.

    Attributes:
        folder: The run's.
        identity: As `identity` gives it.
        failed: Saves in a row that failed.
    """

    folder: Path
    identity: dict[str, Any] = field(repr=False)
    failed: int = 0

    def __call__(self, snapshot: Snapshot) -> None:
        """Saves, or says why not and leaves it to the next time.

        Raises:
            MachineError: The third failure in a row, naming the newest whole checkpoint.
        """
        folder = self.folder / CHECKPOINTS
        try:
            checkpoint.save(folder, snapshot, identity=self.identity)
            self.failed = 0
        except MachineError as error:
            self.failed += 1
            newest = checkpoint.newest(folder)
            kept = f"newest whole checkpoint: {newest.name if newest else 'none yet'}"
            fault = error.faults[0]
            if self.failed >= TRIES:
                text = f"{fault.text}; {self.failed} saves in a row failed; {kept}"
                raise MachineError.of(fault.id, fault.place, text, fault.fix) from error
            warn(f"step {snapshot.step} is not saved ({fault.text}); {kept}; trying again later")
