"""What the tests of the bad-input matrix share: how a refusal must read, and runs cut short."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitft import product, recipe, run
from vitft.card import Card
from vitft.cli import door
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, plain
from vitft.train import Stopped

PLAIN = ("trust.audit=false", "trust.suspects=false", "trust.calibrate=false")


def tree(root: Path) -> str:
    """One hash over names, kinds, modes, times and bytes of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted([root, *root.rglob("*")], key=os.fsencode):
        status = path.lstat()
        digest.update(os.fsencode(path) + f"{status.st_mode} {status.st_mtime_ns}".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def contents(root: Path, *, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file's bytes by relative name; `but` names files that may change."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in but)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@contextmanager
def untouched(*roots: Path) -> Iterator[None]:
    before = [tree(root) for root in roots]
    yield
    assert [tree(root) for root in roots] == before


def refused(
    capsys: pytest.CaptureFixture[str],
    main: Callable[[Sequence[str]], int],
    argv: Sequence[object],
    *,
    code: int,
    id: str,
    says: Sequence[str],
    fix: str,
) -> str:
    """A command ends with this code, and its text has id, place, measured value and remedy."""
    capsys.readouterr()
    assert door(main, [str(a) for a in argv]) == code
    err = capsys.readouterr().err
    assert f"error[{id}] " in err, err
    fault = err[err.index(f"error[{id}] ") :]
    for text in says:
        assert text in fault, fault
    assert fix in fault[fault.index("\nfix: ") :], fault
    assert "Traceback" not in err
    return err


def written(spec: recipe.Recipe, path: Path) -> Path:
    """A recipe as a file, for the command line."""
    path.write_text(recipe.dump(spec))
    return path


def interrupted(
    monkeypatch: pytest.MonkeyPatch, spec: recipe.Recipe, *, after: int, resume: str | None = None
) -> Path:
    """The folder of a run that a signal ended after so many updates; its checkpoint is whole."""
    polls: list[int] = []

    class Stop:
        def __enter__(self) -> Callable[[], int | None]:
            return lambda: polls.append(1) or (15 if len(polls) >= after else None)

        def __exit__(self, *error: object) -> None:
            return None

    with monkeypatch.context() as patched:
        patched.setattr(run, "_polite_stop", lambda folder: Stop())
        with pytest.raises(Stopped):
            run.run(spec, resume=resume)
    (folder,) = (p for p in newest_runs(spec) if not (p / "metrics.json").exists())
    return folder


def newest_runs(spec: recipe.Recipe) -> list[Path]:
    """Run folders of a recipe, the newest first."""
    return sorted((Path(spec.output) / spec.name).glob("2*"), reverse=True)


# --- products without a run ---

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
CONFIG = InputConfig((16, 16), (0.5,) * 3, (0.25,) * 3)
COLOURS = ("blue", "green", "red")


def network(classes: int = 3, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vitflower_ti16", num_classes=classes, **(TINY | options)).eval()


def card(**changes: object) -> Card:
    given = Card(
        architecture="vitflower_ti16",
        classes=COLOURS,
        options=TINY,
        transform=asdict(plain(CONFIG)),
        decode=asdict(DecodeSpec()),
        metrics={"split": "test", "accuracy": 0.5},
    )
    return replace(given, **changes)


def make_product(folder: Path, net: torch.nn.Module | None = None, **changes: object) -> Path:
    """A model folder as a run leaves it."""
    product.save(net or network(), folder, card(**changes), CONFIG, as_timm=False)
    return folder


def forged(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A lone `model.safetensors` whose Card somebody else has written."""
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        raw = json.loads(file.metadata()["vitft"])
    text = change(raw)
    text = text if isinstance(text, str) else json.dumps(raw)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"vitft": text})
    return target / "model.safetensors"
