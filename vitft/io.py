"""The only door to the disk: every byte vitft keeps is written here, whole or not at all.

A file is written beside its target, forced to the disk, then renamed over it; a folder is filled
under a temporary name, sealed with a manifest of sizes and sha256, then renamed. Whatever happens
between (kill, power cut, full disk), a reader meets the old one or the new one, never a mixture.

    files      write_bytes  write_parts  write_text  write_json  write_csv  write_tensors
               staged_file
    logs       append_line  read_lines  trim_lines  open_log   appending  read_json
    folders    staged_dir  verify_dir  newest_whole  keep_newest  make_dir  scratch_dir
    names      remove  move  move_aside  link_latest  sweep
    locks      lock  locked_dir  in_turn  require_free
    asked      require_space  require_writable  require_outside  lies_in  cache_dir

The rows are rooms behind this door (`files`, `logs`, `seals`, `moves`, `locks`, all upon `disk`),
which none but it may enter; what is asked before a write stands here.

Temporary names are `.<name>.<8 hex digits>.tmp`, hidden from every pattern that does not start with
a dot, and locked by their writer, so that `sweep` can tell a dead one from a live one.

Limits: rename and fsync are as good as the file system (NFS and FUSE may promise less); Windows has
no directory fsync, and there a lock left by a killed process must be removed by hand.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from vitft import disk
from vitft.disk import CALLS as CALLS
from vitft.disk import TEMP as TEMP
from vitft.disk import make_dir as make_dir
from vitft.errors import RecipeError
from vitft.files import sha256_bytes as sha256_bytes
from vitft.files import sha256_file as sha256_file
from vitft.files import staged_file as staged_file
from vitft.files import write_bytes as write_bytes
from vitft.files import write_csv as write_csv
from vitft.files import write_json as write_json
from vitft.files import write_parts as write_parts
from vitft.files import write_tensors as write_tensors
from vitft.files import write_text as write_text
from vitft.locks import LOCK as LOCK
from vitft.locks import in_turn as in_turn
from vitft.locks import lock as lock
from vitft.locks import locked_dir as locked_dir
from vitft.locks import require_free as require_free
from vitft.logs import append_line as append_line
from vitft.logs import appending as appending
from vitft.logs import open_log as open_log
from vitft.logs import read_json as read_json
from vitft.logs import read_lines as read_lines
from vitft.logs import trim_lines as trim_lines
from vitft.moves import link_latest as link_latest
from vitft.moves import move as move
from vitft.moves import move_aside as move_aside
from vitft.moves import remove as remove
from vitft.moves import sweep as sweep
from vitft.seals import MANIFEST as MANIFEST
from vitft.seals import keep_newest as keep_newest
from vitft.seals import newest_whole as newest_whole
from vitft.seals import scratch_dir as scratch_dir
from vitft.seals import staged_dir as staged_dir
from vitft.seals import verify_dir as verify_dir


def require_space(folder: Path, need: int) -> None:
    """Refuses work whose output has no room.

    Args:
        folder: Where it will be written; need not exist yet.
        need: Bytes.

    Raises:
        MachineError: `env.disk_full`.
    """
    if disk.free(folder) < need:
        raise disk.no_room(folder, need, "ENOSPC")


def require_writable(folder: Path) -> None:
    """Tries a real write, rename and removal, before hours of work depend on them.

    Raises:
        MachineError: `env.write_failed` or `env.disk_full`.
    """
    trial = disk.temp_name(Path(folder) / "trial")
    write_bytes(trial, b"vitft")
    remove(trial)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether what is written under a name lands in a folder, or replaces it."""
    landing = Path(os.path.realpath(path.parent), path.name)  # a link to a file is replaced itself
    if os.path.isdir(path):  # noqa: PTH112  (False, not an error, where it may not be seen)
        landing = Path(os.path.realpath(path))
    return landing.is_relative_to(os.path.realpath(folder))


def require_outside(out: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output that would replace one of the inputs, or lie in a folder of them.

    Raises:
        RecipeError: `cli.out_in_data`.
    """
    for given in inputs:
        if given.is_dir() and lies_in(out, given):
            text = f"lies below the data {given}, where vitft never writes"
        elif os.path.realpath(out) == os.path.realpath(given):
            text = f"is {given}, which is read and never written"
        else:
            continue
        raise RecipeError.of("cli.out_in_data", out, text, "name a place elsewhere")


def cache_dir() -> Path:
    """Where things that can be made again are kept: $VITFT_CACHE, else the user's cache folder."""
    if own := os.environ.get("VITFT_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "vitft"
