"""Copies are found however they were made, other photographs are not, and memory stays small."""

import io as bytesio

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vitft import audit
from vitft.images import BadImage, DecodeSpec


def scene(seed, size=(120, 90)):
    """A picture with structure: random blobs at a few scales."""
    generator = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(generator.integers(0, 255, (k, k, 3), np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            ),
            float,
        )
        for k in (4, 9, 30)
    ]
    return Image.fromarray((0.5 * layers[0] + 0.35 * layers[1] + 0.15 * layers[2]).astype(np.uint8))


def again(image, quality):
    buffer = bytesio.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(bytesio.BytesIO(buffer.getvalue()))


def prints_of(images):
    made = [audit.fingerprint(image) for image in images]
    return audit.Prints(
        np.array([m[:2] for m in made], np.uint64).reshape(-1, 2), np.array([m[2] for m in made])
    )


def differing(a, b):
    prints = prints_of([a, b])
    return int(np.bitwise_count(prints.bits[0] ^ prints.bits[1]).sum())


def test_a_fingerprint_by_hand():
    ramp = np.tile(np.arange(0, 180, 20, dtype=np.uint8), (9, 1))  # brighter to the right only
    across, down, clear = audit.fingerprint(Image.fromarray(ramp))
    assert (across, down) == (2**64 - 1, 0)
    assert not clear  # 64 clear gradients of 128
    left_half = np.array([[0] + [9] * 8] + [[9] * 9] * 7, np.uint8)  # one step, top left
    assert audit.fingerprint(Image.fromarray(left_half))[0] == 2**63


@pytest.mark.parametrize("seed", range(5))
def test_copies_keep_their_fingerprint(seed):
    picture = scene(seed)
    made = {
        "quality": again(picture, 30),
        "size": picture.resize((48, 36)),
        "stretched": picture.resize((90, 120)),
        "grey": picture.convert("L").convert("RGB"),
        "brighter": ImageEnhance.Brightness(picture).enhance(1.2),
    }
    assert {k: differing(picture, v) for k, v in made.items() if differing(picture, v) > 8} == {}


def test_other_pictures_differ():
    prints = prints_of([scene(seed) for seed in range(60)])
    apart = np.bitwise_count(prints.bits[:, None] ^ prints.bits[None]).sum(axis=2)
    assert apart[np.triu_indices(60, 1)].min() > 32
    assert prints.clear.all()


def test_bare_pictures_prove_nothing_alone():
    bare = prints_of([Image.new("RGB", (50, 50), c) for c in ("black", "white", "red")])
    assert not bare.clear.any()
    assert (bare.bits == 0).all()
    assert audit.link(["a", "b", "c"], bare).found == 0
    # Their features may still say so.
    same = np.ones((3, 4)) + np.arange(3)[:, None] * 1e-4 * np.arange(4)
    spread = np.random.default_rng(0).normal(size=(40, 4))
    prints = audit.Prints(
        np.concatenate(
            [bare.bits, np.random.default_rng(1).integers(0, 2**63, (40, 2), np.uint64)]
        ),
        np.zeros(43, bool),
    )
    found = audit.link([str(i) for i in range(43)], prints, np.concatenate([same, spread]))
    assert len(set(found.group[:3])) == 1


def test_identical_files_are_one_group_and_listed_first():
    prints = prints_of([scene(s) for s in (0, 1, 0, 2, 1, 0)])
    links = audit.link(["s0", "s1", "s0", "s2", "s1", "s0"], prints)
    assert links.found == 3
    assert [(p.a, p.b, p.identical, p.bits) for p in links.pairs] == [
        (0, 2, True, 0),
        (1, 4, True, 0),
        (0, 5, True, 0),
    ]
    assert links.group[0] == links.group[2] == links.group[5]
    assert links.group[1] == links.group[4]
    assert len(set(links.group)) == 3


def test_links_go_through_others():
    prints = prints_of([scene(0), again(scene(0), 20), scene(1), scene(0)])
    links = audit.link(["a", "b", "c", "a"], prints)
    assert links.group[0] == links.group[1] == links.group[3]
    assert links.group[2] not in links.group[[0, 1, 3]]
    assert [(p.a, p.b, p.identical) for p in links.pairs] == [(0, 3, True), (0, 1, False)]
    assert np.isnan(links.pairs[1].cosine)


def flip(bits, count):
    """A fingerprint with `count` bits turned."""
    turned = np.unpackbits(np.array([bits], ">u8").view(np.uint8))
    turned[:count] ^= 1
    return np.packbits(turned).view(">u8").astype(np.uint64)


@pytest.mark.parametrize(
    ("bits", "distance", "expected"),
    [
        (8, 2.5, True),  # the fingerprint alone
        (9, 2.5, False),
        (16, 1.9, True),  # features that are not far
        (17, 1.9, False),
        (32, 0.35, True),  # features that are near
        (33, 0.35, False),
        (40, 0.28, True),
        (41, 0.28, False),
        (60, 0.1, True),  # features alone
        (60, 0.15, False),
    ],
)
def test_every_rule_holds_up_to_its_bounds(bits, distance, expected):
    """Rows 0 and 1 lie `distance` typical distances apart and differ in `bits` gradients."""
    generator = np.random.default_rng(0)
    n = 41
    prints = generator.integers(0, 2**63, (n, 2), np.uint64)
    prints[1] = flip(prints[0], bits).tolist() if bits <= 64 else prints[1]
    rows = np.zeros((n, n + 2))
    rows[:, 0] = np.sqrt(0.5)  # every two photographs: cosine .5, distance .5
    rows[np.arange(n), np.arange(n) + 1] = np.sqrt(0.5)
    cosine = 1 - 0.5 * distance
    rows[1] = cosine * rows[0]
    rows[1, -1] = np.sqrt(1 - cosine**2)
    links = audit.link([str(i) for i in range(n)], audit.Prints(prints, np.ones(n, bool)), rows)
    assert (links.group[0] == links.group[1]) == expected
    assert links.found == int(expected)


def test_blocks_change_nothing(monkeypatch):
    generator = np.random.default_rng(3)
    n = 200
    bits = generator.integers(0, 2**63, (n, 2), np.uint64)
    bits[100:] = bits[:100] ^ (generator.random((100, 2)) < 0.5)  # pairs, 0 to 2 bits apart
    rows = generator.normal(size=(n, 12))
    prints, names = audit.Prints(bits, np.ones(n, bool)), [str(i) for i in range(n)]
    whole = audit.link(names, prints, rows)
    assert whole.found >= 100
    monkeypatch.setattr(audit, "CELLS", 777)
    monkeypatch.setattr(audit, "EDGES", 10)
    parts = audit.link(names, prints, rows)
    assert parts.found == whole.found
    assert {(p.a, p.b) for p in parts.pairs} == {(p.a, p.b) for p in whole.pairs}
    assert same_groups(parts.group, whole.group)


def same_groups(a, b):
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def test_groups_equal_scipy_on_all_pairs():
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 2**63, (30, 2), np.uint64)[generator.integers(0, 30, 120)]
    bits ^= (generator.random((120, 2)) < 0.3).astype(np.uint64)
    links = audit.link([str(i) for i in range(120)], audit.Prints(bits, np.ones(120, bool)))
    apart = np.bitwise_count(bits[:, None] ^ bits[None]).sum(axis=2)
    expected = connected_components(coo_array(apart <= 12), directed=False)[1]
    assert same_groups(links.group, expected)
    assert links.found == (np.triu(apart <= 12, 1)).sum()


def test_only_so_many_pairs_are_listed_but_all_are_grouped(monkeypatch):
    monkeypatch.setattr(audit, "LISTED", 5)
    monkeypatch.setattr(audit, "CELLS", 50)
    bits = np.zeros((30, 2), np.uint64)
    bits[:, 0] = np.arange(30) % 3  # a few bits apart
    links = audit.link([str(i) for i in range(30)], audit.Prints(bits, np.ones(30, bool)))
    assert len(links.pairs) == 5
    assert {p.bits for p in links.pairs} == {0}
    assert links.found == 30 * 29 // 2
    assert len(set(links.group)) == 1


def test_linked_test_photographs_and_pairs_across():
    group = np.array([0, 0, 1, 2, 2, 3])
    pairs = (audit.Pair(0, 1, True, 0, 1.0), audit.Pair(3, 4, False, 3, 0.9))
    links = audit.Links(group, pairs, 2)
    split = ["train", "test", "test", "test", "test", "val"]
    assert links.linked(split).tolist() == [False, True, False, False, False, False]
    assert links.across(split) == (pairs[0],)
    assert links.across(["a", "a", "a", "a", "b", "a"]) == (pairs[1],)


def test_accuracy_with_and_without_linked_photographs():
    right = np.array([True] * 8 + [False] * 2)
    tied = np.array([True] * 4 + [False] * 6)
    result = audit.honest(right, tied)
    assert (result.everything.right, result.everything.n) == (8, 10)
    assert (result.unlinked.right, result.unlinked.n) == (4, 6)
    assert (result.linked.right, result.linked.n) == (4, 4)
    assert result.sentence() == (
        "4 of 10 test photographs have a copy or near-copy in train or val: accuracy "
        "80.0 % [49.0, 94.3] with them, 66.7 % [30.0, 90.3] without"
    )
    assert audit.honest([True], [True]).sentence().endswith("unknown without")
    assert "no test photograph" in audit.honest([True], [False]).sentence()


def test_fingerprints_are_remembered(tmp_path, monkeypatch):
    files = [tmp_path / f"{i}.jpg" for i in range(3)]
    for i, file in enumerate(files):
        scene(i).save(file, quality=90)
    cache, names = tmp_path / "cache", ["x", "y", "z"]
    first = audit.fingerprints(files, names, DecodeSpec(), cache=cache)
    assert first.clear.all()
    with monkeypatch.context() as patched:
        patched.setattr(audit, "decode", lambda *a, **k: pytest.fail("decoded again"))
        second = audit.fingerprints(files, names, DecodeSpec(), cache=cache)
    assert (first.bits == second.bits).all()
    assert (first.clear == second.clear).all()
    saved = next(cache.iterdir())
    saved.write_bytes(saved.read_bytes()[:40])
    third = audit.fingerprints(files, names, DecodeSpec(), cache=cache)
    assert (first.bits == third.bits).all()
    other = audit.fingerprints(files[:2], names[:2], DecodeSpec(), cache=cache)
    assert (other.bits == first.bits[:2]).all()


def test_a_file_that_broke_since_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(BadImage, match=r"broken\.jpg"):
        audit.fingerprints([tmp_path / "broken.jpg"], ["x"], DecodeSpec())


def test_nothing_and_one_are_fine():
    none = audit.Prints(np.empty((0, 2), np.uint64), np.empty(0, bool))
    assert audit.link([], none).group.tolist() == []
    one = prints_of([scene(0)])
    assert audit.link(["a"], one, np.ones((1, 3))).found == 0


def test_lengths_are_checked():
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        audit.link(["a", "b"], prints_of([scene(0)]))


@pytest.mark.shared
def test_the_known_duplicates_of_the_flowers_are_found(flowers):
    import hashlib

    names = ["15922772266_1167a06620.jpg", "17291930305_79deae6a90_n.jpg"]
    files = [flowers / kind / name for kind in ("rose", "tulip") for name in names]
    sha = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    links = audit.link(sha, audit.fingerprints(files, sha, DecodeSpec()))
    across = links.across(["rose", "rose", "tulip", "tulip"])
    assert [(p.a, p.b, p.identical) for p in across] == [(0, 2, True), (1, 3, True)]


def test_bare_pictures_with_other_features_are_not_linked():
    bare = prints_of([Image.new("RGB", (50, 50), c) for c in ("black", "white", "red")])
    others = prints_of([scene(s) for s in range(5)])
    prints = audit.Prints(
        np.concatenate([bare.bits, others.bits]), np.concatenate([bare.clear, others.clear])
    )
    rows = np.concatenate([-10 * np.eye(3, 8), np.eye(8, 8)[3:] + np.ones(8)])
    assert audit.link([str(i) for i in range(8)], prints, rows).found == 0
