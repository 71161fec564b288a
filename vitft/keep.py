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

from vitft import checkpoint, io, prepare, tune
from vitft.checkpoint import Snapshot
from vitft.console import say, warn
from vitft.errors import MachineError, RecipeError
from vitft.prepare import Prepared

CHECKPOINTS = "checkpoints"
AT_ONCE = 3  # checkpoints on the disk while one is written: two kept, one under way
TRIES = 3  # saves in a row that may fail
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


def find(base: Path) -> Path:
    """The newest run folder below `base` with a whole checkpoint and without its report.

    The report is written last: what a kill leaves after the final numbers is finished, too.

    Raises:
        RecipeError: `run.nothing_to_resume`.
    """
    for folder in sorted(base.glob("2*"), reverse=True):
        done = (folder / "report.html").exists()
        if not done and checkpoint.newest(folder / CHECKPOINTS) is not None:
            return folder
    raise _nothing(base, "no unfinished run with a whole checkpoint is here")


def named(folder: Path) -> Path:
    """A run folder that the reader named.

    Raises:
        RecipeError: `run.nothing_to_resume`: there is no such folder.
    """
    if not folder.is_dir():
        raise _nothing(folder, "there is no such run folder")
    return folder


def open_newest(p: Prepared, folder: Path, *, anyway: bool) -> Snapshot:
    """The state to go on from; nothing in the folder has changed yet.

    Args:
        p: The run as it is asked for now.
        folder: Of the interrupted run.
        anyway: Go on although recipe, data or classes have changed.

    Raises:
        RecipeError: `run.nothing_to_resume`: finished, or without a whole checkpoint.
        WeightsError: As `vitft.checkpoint.load`.
    """
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
    return snapshot


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


def _nothing(place: Path, text: str) -> Exception:
    fix = "leave out --resume to start anew; cached features are used again"
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
