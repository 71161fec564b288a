"""Which photographs are the same one: copies and near-copies within and across splits and classes.

A test photograph whose twin was trained on is not a test, and a photograph that stands in two
classes has a wrong label in one. Three kinds of evidence, cheapest first:

    sha256        the same bytes
    fingerprint   128 signs of brightness gradients (dHash, 64 across and 64 down): survives another
                  size, quality, tint or black-and-white copy of a photograph
    cosine        of cached features of a frozen backbone: survives a small shift or crop, and
                  rejects two different photographs that only share a layout

How close is close depends on the backbone, so a feature distance is measured in units of the
typical distance from a photograph to its nearest neighbour. `RULES` was chosen by looking at the
150 closest pairs of 3,458 flowers under a convolutional network and a ViT. Frames of a burst that
lie farther apart are missed; `data.group` keeps those together.

Everything runs in blocks: memory does not grow with N squared.

Arrays: N photographs, D feature width, E pairs found.
Source of the fingerprint: N. Krawetz, Kind of like that (dHash), 2013.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from vitft import io
from vitft.images import DecodeSpec, decode, read_bytes
from vitft.stats import Interval, wilson

GRID = 8  # gradients per row and column of a fingerprint
CLEAR = 80  # gradients that must exceed the noise for a fingerprint to prove anything alone
NOISE = 2  # grey levels
SCALE = 32  # pixels that the short side keeps at least when a JPEG is decoded for its fingerprint
# Bits that differ at most, and distance at most.
RULES = ((8, np.inf), (16, 2.0), (32, 0.4), (40, 0.3), (128, 0.12))
ALONE = 12  # bits, where there are no features
SAMPLE = 512  # photographs that tell the typical distance
CELLS = 4_000_000  # pairs looked at together: some 100 MB
LISTED = 10_000  # pairs kept to be shown
EDGES = 1_000_000  # pairs kept to form groups before they are condensed

Bits = NDArray[np.uint64]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Rows = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prints:
    """Fingerprints of N photographs.

    Attributes:
        bits: [N, 2] uint64, gradients across and down.
        clear: [N] whether the photograph has enough structure for its fingerprint to be proof; a
            bare wall and a black frame share theirs with every other.
    """

    bits: Bits
    clear: Mask


@dataclass(frozen=True)
class Pair:
    """Two photographs that are the same one, or nearly.

    Attributes:
        a: Row of the first.
        b: Row of the second, a < b.
        identical: Whether the bytes are the same.
        bits: Gradients of 128 that differ; 0 when identical.
        cosine: Of the features; nan without features.
    """

    a: int
    b: int
    identical: bool
    bits: int
    cosine: float


@dataclass(frozen=True, eq=False)
class Links:
    """Photographs joined by pairs.

    Attributes:
        group: [N] int64, equal for photographs that are linked, directly or through others.
        pairs: The closest pairs, identical ones first, `LISTED` at most.
        found: Pairs in all.
    """

    group: Ints
    pairs: tuple[Pair, ...]
    found: int

    def across(self, names: Sequence[object]) -> tuple[Pair, ...]:
        """The listed pairs whose two names ([N] classes or splits) differ."""
        return tuple(p for p in self.pairs if names[p.a] != names[p.b])

    def linked(self, split: Sequence[str], target: str = "test") -> Mask:
        """[N] whether a photograph of `target` is linked to one outside of it."""
        inside = np.asarray(split) == target
        return np.asarray(inside & np.isin(self.group, self.group[~inside]), bool)


@dataclass(frozen=True)
class Share:
    """right of n, with its Wilson interval; the value is nan when n is 0."""

    right: int
    n: int
    value: float
    interval: Interval


@dataclass(frozen=True)
class Honest:
    """An accuracy with and without the photographs that are linked to the training data."""

    everything: Share
    unlinked: Share
    linked: Share

    def sentence(self) -> str:
        """What the linked photographs do to the accuracy, as one line."""
        if self.linked.n == 0:
            return "no test photograph has a copy or near-copy in train or val"
        return (
            f"{self.linked.n:,} of {self.everything.n:,} test photographs have a copy or near-copy"
            f" in train or val: accuracy {_percent(self.everything)} with them,"
            f" {_percent(self.unlinked)} without"
        )


def fingerprint(image: Image.Image) -> tuple[int, int, bool]:
    """Two 64-bit fingerprints of a picture, and whether they are clear enough to be proof."""
    grey = image.convert("L")
    across = np.asarray(grey.resize((GRID + 1, GRID), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((GRID, GRID + 1), Image.Resampling.BOX), np.int16)
    steps = np.stack([np.diff(across, axis=1), np.diff(down, axis=0)]).reshape(2, -1)  # [2, 64]
    first, second = np.packbits(steps > 0, axis=1).view(">u8").ravel().tolist()
    return first, second, int((np.abs(steps) >= NOISE).sum()) >= CLEAR


def fingerprints(
    files: Sequence[Path],
    sha256: Sequence[str],
    spec: DecodeSpec,
    *,
    cache: Path | None = None,
    workers: int = 2,
) -> Prints:
    """Fingerprints of N photographs, read once and then remembered.

    Args:
        files: Where they lie.
        sha256: Their content hashes, which name the cached file.
        spec: How they are decoded.
        cache: Folder to remember them in; None to forget.
        workers: Threads; JPEGs are decoded at 1/8 to 1/1 scale.

    Raises:
        BadImage: A file cannot be decoded.
    """
    key = hashlib.sha256("\n".join([spec.key(), str((GRID, CLEAR, NOISE)), *sha256]).encode())
    file = None if cache is None else cache / f"fingerprints-{key.hexdigest()[:24]}.safetensors"
    known = _read(file, len(files))
    if known is not None:
        return known

    def one(path: Path) -> tuple[int, int, bool]:
        return fingerprint(decode(read_bytes(path), path, spec, short_side=SCALE))

    with ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(one, files))
    bits = np.array([m[:2] for m in made], np.uint64).reshape(-1, 2)
    prints = Prints(bits, np.array([m[2] for m in made], bool))
    if file is not None:
        clear = prints.clear.astype(np.uint8)
        io.write_tensors(file, {"bits": bits.view(np.int64), "clear": clear}, {})
    return prints


def link(sha256: Sequence[str], prints: Prints, features: ArrayLike | None = None) -> Links:
    """Finds copies and near-copies.

    Args:
        sha256: [N] content hashes.
        prints: Of the same N photographs.
        features: [N, D] of a frozen backbone in the plain view; without them only fingerprints
            that differ in at most `ALONE` bits count.

    Raises:
        ValueError: The lengths disagree.
    """
    n = len(sha256)
    rows = None if features is None else _unit(features)
    if len(prints.bits) != n or (rows is not None and len(rows) != n):
        sizes = f"{n}, {len(prints.bits)} and {n if rows is None else len(rows)}"
        raise ValueError(f"link needs as many hashes, prints and features, got {sizes}")
    _, first, member = np.unique(sha256, return_index=True, return_inverse=True)
    twin = first[member]  # [N] the first photograph with the same bytes
    copies = np.flatnonzero(twin != np.arange(n))
    identical = [Pair(int(twin[i]), int(i), True, 0, 1.0) for i in copies[:LISTED]]
    once = np.sort(first)
    a, b, bits, cosine, edges, found = _near(prints, rows, once)
    near = [
        Pair(int(once[i]), int(once[j]), False, int(d), float(c))
        for i, j, d, c in zip(a, b, bits, cosine, strict=True)
    ]
    both = np.concatenate([once[edges], np.stack([twin[copies], copies])], axis=1)
    pairs = tuple((identical + near)[:LISTED])
    return Links(_components(both, n), pairs, len(copies) + found)


def honest(right: ArrayLike, linked: ArrayLike) -> Honest:
    """Accuracy with and without linked photographs.

    Args:
        right: [n] bool, whether each test photograph was named correctly.
        linked: [n] bool, `Links.linked` of the same photographs.
    """
    r, tied = np.asarray(right, dtype=bool), np.asarray(linked, dtype=bool)
    return Honest(_share(r), _share(r[~tied]), _share(r[tied]))


def _share(right: Mask) -> Share:
    k, n = int(right.sum()), len(right)
    return Share(k, n, k / n if n else float("nan"), wilson(k, n))


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} % {share.interval.percent()}" if share.n else "unknown"


def _read(file: Path | None, n: int) -> Prints | None:
    """Remembered fingerprints; None when there are none, or the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if file is None or not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError):
        return None
    bits, clear = tensors.get("bits"), tensors.get("clear")
    if bits is None or clear is None or bits.shape != (n, 2) or clear.shape != (n,):
        return None
    return Prints(bits.view(np.uint64), clear.astype(bool))


def _unit(features: ArrayLike) -> Rows:
    """[N, D] float32 rows of length 1; a row of zeros stays zero."""
    rows = np.asarray(features, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def _typical(rows: Rows) -> float:
    """The median distance (1 - cosine) from a photograph to its nearest neighbour."""
    if len(rows) < 2:
        return 0.0
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64)
    nearest = np.empty(len(chosen), np.float32)
    step = max(1, CELLS // len(rows))
    for start in range(0, len(chosen), step):
        some = chosen[start : start + step]
        cosines = rows[some] @ rows.T  # [b, N]
        cosines[np.arange(len(some)), some] = -np.inf
        nearest[start : start + step] = cosines.max(axis=1)
    return max(0.0, float(np.median(1 - nearest)))


Near = tuple[Ints, Ints, Ints, Floats, Ints, int]


def _near(prints: Prints, rows: Rows | None, once: Ints) -> Near:
    """Near-copies among the photographs `once`, as positions in it.

    Returns:
        a, b, bits, cosine: [E'] of the closest `LISTED` pairs; edges [2, E''] that join all linked
        photographs; the number of pairs found.
    """
    kept = np.empty((0, 4))  # a, b, bits, cosine
    edges, found = np.empty((2, 0), np.int64), 0
    for block in _blocks(prints.bits[once], prints.clear[once], rows, once):
        found += len(block)
        kept = np.concatenate([kept, block])
        if len(kept) > 2 * LISTED:
            kept = kept[_closest(kept)[:LISTED]]
        edges = np.concatenate([edges, block[:, :2].T.astype(np.int64)], axis=1)
        if edges.shape[1] > EDGES:
            edges = _star(edges, len(once))
    kept = kept[_closest(kept)[:LISTED]]
    a, b, bits = (kept[:, i].astype(np.int64) for i in range(3))
    return a, b, bits, kept[:, 3], edges, found


def _blocks(bits: Bits, clear: Mask, rows: Rows | None, once: Ints) -> Iterator[Floats]:
    """[e, 4] of a, b, bits and cosine: the pairs of some photographs with all later ones."""
    n = len(bits)
    unit = None if rows is None else rows[once]
    typical = 0.0 if unit is None else _typical(unit)
    start = 0
    while start < n - 1:
        stop = min(n, start + max(1, CELLS // (n - start)))
        differing = np.bitwise_count(bits[start:stop, None, 0] ^ bits[None, start:, 0])
        differing += np.bitwise_count(bits[start:stop, None, 1] ^ bits[None, start:, 1])
        clears = clear[start:stop, None] & clear[None, start:]
        cosines = None if unit is None else unit[start:stop] @ unit[start:].T
        close = _close(differing, clears, cosines, typical)
        close &= np.arange(start, n)[None] > np.arange(start, stop)[:, None]
        i, j = np.nonzero(close)
        found = np.full(len(i), np.nan) if cosines is None else cosines[i, j]
        yield np.stack([i + start, j + start, differing[i, j], found], axis=1)
        start = stop


def _close(differing: NDArray[np.uint8], clear: Mask, cosines: Rows | None, typical: float) -> Mask:
    """[b, m] whether two photographs are near-copies, by `RULES`."""
    if cosines is None:
        return clear & (differing <= ALONE)
    close = np.zeros(differing.shape, bool)
    for most, distance in RULES:
        rule = differing <= most
        rule &= clear if distance == np.inf else cosines >= 1 - distance * typical
        close |= rule
    return close


def _closest(pairs: Floats) -> Ints:
    """Positions of [E, 4] pairs, the fewest differing bits first, then the highest cosine."""
    return np.lexsort((-np.nan_to_num(pairs[:, 3]), pairs[:, 2]))


def _components(edges: Ints, n: int) -> Ints:
    """[N] the component of each photograph under edges [2, E]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(edges.shape[1], np.int8)
    graph = coo_array((ones, (edges[0], edges[1])), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _star(edges: Ints, n: int) -> Ints:
    """Fewer edges [2, N at most] with the same components: each photograph to the first of its."""
    _, first, member = np.unique(_components(edges, n), return_index=True, return_inverse=True)
    to = first[member]
    joined = np.flatnonzero(to != np.arange(n))
    return np.stack([to[joined], joined])
