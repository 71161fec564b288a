"""What the cache holds, and an end to it: `python -m vitft.cache info|clear`.

Features lie in spaces, one for each backbone, transform and type; clearing costs nothing but the
time to compute them again. Downloaded data sets and the scan's verdicts stay.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from vitft import io, store
from vitft.errors import escape


def lines() -> list[str]:
    """One line per space, and the sum."""
    spaces = store.spaces()
    out = [_line(space) for space in spaces]
    total = sum(space.size for space in spaces)
    out.append(f"{len(spaces):,} spaces, {total / 1e6:,.1f} MB in {store.features_dir()}")
    return [escape(line) for line in out]


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
    """Removes every space, and nothing else that may lie there; returns the bytes freed."""
    freed = 0
    for space in store.spaces():
        if re.fullmatch("[0-9a-f]{32}", space.folder.name):
            io.remove(space.folder)
            freed += space.size
    return freed


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what there is, or removes it."""
    parser = argparse.ArgumentParser(
        prog="vitft cache",
        description="Says what the cache of features holds, or empties it.",
        epilog="example: python -m vitft.cache info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("info", "clear"), help="list it, or empty it")
    if parser.parse_args(argv).what == "clear":
        print(f"{clear() / 1e6:,.1f} MB freed")  # noqa: T201
    else:
        print("\n".join(lines()))  # noqa: T201
    return 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
