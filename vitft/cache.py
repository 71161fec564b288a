"""What the cache holds, and an end to it: `python -m vitft.cache info|clear`.

Features lie in spaces, one for each backbone, transform and type; clearing them and the pieces of
files on servers costs nothing but the time to have them again. Downloaded data sets and what scans
have found out stay.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitft import afar, io, store
from vitft.errors import escape

OTHERS = {  # folders that stay
    "datasets": "downloaded data sets",
    "afar": "what is known of files on servers",
    "verdicts": "which files decode",
    "prints": "fingerprints of photographs",
}


def lines() -> list[str]:
    """One line per space, their sum, and the other folders that hold something."""
    spaces = store.spaces()
    out = [_line(space) for space in spaces]
    total = sum(space.size for space in spaces)
    out.append(f"{len(spaces):,} spaces, {total / 1e6:,.1f} MB in {store.features_dir()}")
    pieces = _size(afar.pieces_dir())
    if pieces:
        out.append(f"{pieces / 1e6:,.1f} MB of files on servers in {afar.pieces_dir()}")
    for name, what in OTHERS.items():
        folder = io.cache_dir() / name
        size = _size(folder) - pieces * (name == "afar")
        if size:
            out.append(f"{size / 1e6:,.1f} MB, {what}, in {folder}; not cleared")
    return [escape(line) for line in out]


def _size(folder: Path) -> int:
    """Bytes of all files below; those that go meanwhile do not count."""
    sizes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                sizes += Path(parent, name).lstat().st_size
    return sizes


def _line(space: store.Info) -> str:
    about = space.about
    transform = _object(about.get("transform"))
    kind, size = transform.get("kind", "unknown"), transform.get("size", "?")
    return (
        f"{space.folder.name[:12]}  {space.rows:>9,} rows  {space.size / 1e6:>9,.1f} MB  "
        f"{str(about.get('backbone', 'unknown'))[:48]}  {kind} {size}  {about.get('dtype', '?')}"
    )


def _object(text: object) -> dict[str, Any]:
    try:
        found = json.loads(str(text))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def clear() -> int:
    """Removes every space and piece, and nothing else that may lie there; returns bytes freed."""
    freed = _size(afar.pieces_dir())
    for file in afar.pieces_dir().glob("*"):  # one by one, for a run may be adding some
        io.remove(file)
    for space in store.spaces():
        if re.fullmatch("[0-9a-f]{32}", space.folder.name):
            io.remove(space.folder)
            freed += space.size
    return freed


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what there is, or removes it."""
    parser = argparse.ArgumentParser(
        prog="vitft cache",
        description="Says what the cache holds, or removes what is quickly had again.",
        epilog="example: python -m vitft.cache info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", choices=("info", "clear"), help="list it, or remove features and pieces"
    )
    if parser.parse_args(argv).what == "clear":
        print(f"{clear() / 1e6:,.1f} MB freed")  # noqa: T201
    else:
        print("\n".join(lines()))  # noqa: T201
    return 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
