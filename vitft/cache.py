"""What the cache holds, and an end to it: `python -m vitft.cache info|clear`.

Features lie in spaces, one for each backbone, transform and type; clearing costs nothing but the
time to compute them again. Downloaded data sets and the scan's verdicts stay.
"""

import argparse
import json
import sys
from collections.abc import Sequence

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
    transform = json.loads(about.get("transform", "{}"))
    kind, size = transform.get("kind", "unknown"), transform.get("size", "?")
    return (
        f"{space.folder.name[:12]}  {space.rows:>9,} rows  {space.size / 1e6:>9,.1f} MB  "
        f"{about.get('backbone', 'unknown')[:48]}  {kind} {size}  {about.get('dtype', '?')}"
    )


def clear() -> int:
    """Removes every space; returns the bytes freed."""
    freed = sum(space.size for space in store.spaces())
    io.remove(store.features_dir())
    return freed


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what there is, or removes it."""
    parser = argparse.ArgumentParser(
        prog="vitft cache",
        description="Says what the cache of features holds, or empties it.",
        epilog="example: python -m vitft.cache info",
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
