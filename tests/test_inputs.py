"""Transforms against torchvision's own, normalising against timm's, and seeds as pure functions."""

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.loader import PrefetchLoader
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torchvision import transforms as tv

from vitft.errors import RecipeError
from vitft.inputs import (
    InputConfig,
    TransformSpec,
    augmented,
    derive_seed,
    epoch_rows,
    erase,
    normalise,
    permutation,
    pixels,
    plain,
    seeded,
)
from vitft.resize import resized

HALF = (0.5, 0.5, 0.5)
CONFIG = InputConfig((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9)
TUTORIAL = SimpleNamespace(augment="tutorial", reprob=0.0)


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((500, 333), Image.Resampling.BICUBIC)


def timms(spec, picture, seed):
    """What timm's own transform makes of the picture after seeding the global generators."""
    whole = create_transform(
        (3, *spec.size),
        is_training=True,
        scale=spec.scale,
        ratio=spec.ratio,
        hflip=spec.hflip,
        color_jitter=None,
        auto_augment=spec.auto_augment,
        interpolation=spec.interpolation,
        mean=spec.mean,
        use_prefetcher=True,
    )
    with seeded(seed):
        return whole(picture)


def noise(width, height, seed):
    rng = np.random.default_rng(seed)
    grains = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize((width, height), Image.Resampling.BICUBIC)


# ---- transforms ---------------------------------------------------------------------------------


def test_the_tutorials_evaluation_is_resize_256_and_centre_crop_224(picture):
    want = tv.Compose([tv.Resize(256), tv.CenterCrop(224), tv.PILToTensor()])(picture)
    got = pixels(plain(CONFIG, "tutorial"))(picture)
    assert got.dtype == torch.uint8
    assert torch.equal(got, want)


def test_the_tutorials_training_is_torchvisions_random_crop_and_flip(picture):
    spec = augmented(CONFIG, TUTORIAL, "tutorial")
    crop = RandomResizedCropAndInterpolation(224, (0.08, 1.0), (3 / 4, 4 / 3), "bilinear")
    flips = 0
    for seed in range(10):
        with seeded(seed):
            got = pixels(spec)(picture)
        with seeded(seed):
            top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
            flip = bool(torch.rand(1) < 0.5)
        want = tv.functional.resized_crop(picture, top, left, height, width, [224, 224])
        want = tv.functional.hflip(want) if flip else want
        assert torch.equal(got, tv.functional.pil_to_tensor(want))
        assert 0.08 * 0.9 < height * width / (500 * 333) <= 1
        flips += flip
    assert 0 < flips < 10


def test_other_weights_are_evaluated_as_their_data_config_says(picture):
    for transform in ("timm", "auto"):
        got = pixels(plain(CONFIG, transform))(picture)
        bicubic = tv.InterpolationMode.BICUBIC
        want = tv.Compose([tv.Resize(248, bicubic), tv.CenterCrop(224), tv.PILToTensor()])(picture)
        assert torch.equal(got, want)


def test_mean_and_deviation_stay_those_of_the_weights_in_every_transform():
    for spec in (plain(CONFIG, "tutorial"), augmented(CONFIG, TUTORIAL), plain(CONFIG)):
        assert (spec.mean, spec.std) == (CONFIG.mean, CONFIG.std)


@settings(deadline=None, max_examples=60)
@example(width=1, height=1, seed=1, method="bicubic")  # a crop of no pixel
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    seed=st.integers(0, 2**63 - 1),
    method=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
def test_a_random_crop_is_timms_to_the_bit_whatever_holds_the_picture(width, height, seed, method):
    spec = augmented(replace(CONFIG, size=(24, 32), interpolation=method), TUTORIAL)
    picture = noise(width, height, seed % 1000)
    want = timms(spec, picture, seed)
    state = torch.get_rng_state(), random.getstate()
    for held in (picture, np.array(picture)):
        assert torch.equal(pixels(spec).view(held, seed), want)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def rows_first(picture, size, method):
    """Pillow's two passes in the order that it always took before version 13."""
    method = Image.Resampling[method.upper()]
    narrow = picture.resize((size[1], picture.height), method)
    return np.asarray(narrow.resize((size[1], size[0]), method)).astype(int).transpose(2, 0, 1)


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    seed=st.integers(0, 1000),
    method=st.sampled_from(["bilinear", "bicubic"]),
)
def test_the_fast_resize_is_pillows_rows_first_within_two_grey_values(width, height, seed, method):
    picture = noise(width, height, seed)
    want = rows_first(picture, (32, 48), method)
    for held in (picture, np.array(picture)):
        got = resized(held, (32, 48), method, fast=True).numpy()
        assert np.abs(got - want).max() <= (1 if method == "bilinear" else 2)
        mirrored = resized(held, (32, 48), method, fast=True, mirrored=True).numpy()
        assert np.array_equal(mirrored, got[:, :, ::-1])


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["center", "squash", "random"]),
)
def test_the_fast_resize_takes_timms_crop_and_flip(width, height, seed, mode):
    shades = np.array(noise(width, height, seed)) // 4 + np.arange(height)[:, None, None] % 64
    picture = Image.fromarray((shades + np.arange(width)[None, :, None] % 64).astype(np.uint8))
    config = replace(CONFIG, size=(32, 32), crop_mode="center" if mode == "random" else mode)
    make = plain if mode != "random" else lambda c, *a: augmented(c, TUTORIAL, *a)
    want, got = (
        pixels(make(config, "timm", how)).view(picture, seed).int() for how in ("pillow", "fast")
    )
    gap = (got - want).abs().float()
    assert gap.mean() < 1
    assert gap.max() <= 16  # of Pillow 13's other order of passes


def test_a_policy_goes_on_top_of_the_fast_resize(picture):
    train = SimpleNamespace(augment="rand-m1-n1", reprob=0.0)
    spec = augmented(CONFIG, train, "timm", "fast")
    gaps = [
        (pixels(spec).view(picture, s).int() - timms(spec, picture, s).int()).abs().float().mean()
        for s in range(6)
    ]
    assert max(gaps) < 1.5


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"interpolation": "lanczos"}])
def test_what_has_no_fast_way_is_refused(change):
    with pytest.raises(RecipeError, match=r"data.resize: got fast, which knows neither"):
        plain(replace(CONFIG, **change), "timm", "fast")
    with pytest.raises(RecipeError, match=r"set data.resize: pillow"):
        augmented(replace(CONFIG, **change), TUTORIAL, "timm", "fast")
    plain(replace(CONFIG, **change), "timm", "pillow")


def test_plain_training_changes_no_pixel_but_may_still_erase():
    train = SimpleNamespace(augment="plain", reprob=0.25)
    assert augmented(CONFIG, train) == replace(plain(CONFIG), erase=0.25)


def test_a_policy_is_timms_and_an_unknown_one_is_refused(picture):
    train = SimpleNamespace(augment="rand-m9-mstd0.5-inc1", reprob=0.0)
    spec = augmented(CONFIG, train)
    for seed in range(8):
        assert torch.equal(pixels(spec).view(picture, seed), timms(spec, picture, seed))
    for policy in ("rnad-m9", "rand-q9", "foo"):
        with pytest.raises(
            RecipeError, match=rf"train.augment: got '{policy}', which timm does not"
        ):
            augmented(CONFIG, SimpleNamespace(augment=policy, reprob=0.0))


def test_every_field_of_a_transform_changes_its_key():
    spec = plain(CONFIG)
    changes = {
        "kind": "augmented",
        "size": (32, 32),
        "mean": HALF,
        "std": HALF,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "scale": (0.5, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "auto_augment": "rand-m9",
        "erase": 0.5,
        "resize": "fast",
    }
    keys = {replace(spec, **{name: value}).key() for name, value in changes.items()}
    assert len(keys | {spec.key()}) == 14
    assert set(json.loads(spec.key())) == set(changes) - {"resize"}  # as keys were before it
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(spec.key()).items()}
    assert TransformSpec(**fields) == spec


def test_normalising_equals_timms_loader_to_the_bit():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    loader = [(images, torch.zeros(4))]
    peer = PrefetchLoader(loader, CONFIG.mean, CONFIG.std, device=torch.device("cpu"))
    ((want, _),) = list(peer)
    assert torch.equal(normalise(images, plain(CONFIG)), want)


# ---- seeds --------------------------------------------------------------------------------------


def test_derived_seeds_are_fixed_for_ever():
    assert derive_seed(0) == 7520536977032167579
    assert derive_seed(7, "view", 3, "ab") == 1411930065788585114
    text = b'[7,"view",3,"ab"]'
    assert int(hashlib.sha256(text).hexdigest()[:16], 16) // 2 == 1411930065788585114
    assert derive_seed(0, 1, 2) != derive_seed(0, 12)
    assert derive_seed(0, 1) != derive_seed(0, "1")


@given(st.integers(-(2**70), 2**70), st.lists(st.integers() | st.text(), max_size=3))
@settings(max_examples=100)
def test_a_derived_seed_has_63_bits_and_depends_on_its_arguments_alone(seed, parts):
    value = derive_seed(seed, *parts)
    assert 0 <= value < 2**63
    assert value == derive_seed(seed, *parts)


def test_a_permutation_is_fixed_by_seed_and_epoch_alone():
    assert permutation(8, 0, 0).tolist() == [0, 4, 6, 7, 2, 1, 3, 5]
    assert sorted(permutation(1000, 3, 5)) == list(range(1000))
    assert permutation(1000, 3, 5).tolist() == permutation(1000, 3, 5).tolist()
    assert permutation(1000, 3, 5).tolist() != permutation(1000, 3, 6).tolist()
    assert permutation(1000, 3, 5).tolist() != permutation(1000, 4, 5).tolist()
    assert permutation(0, 0, 0).shape == (0,)


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_lent_seeds_fix_all_three_generators_and_are_given_back():
    with seeded(5):
        first = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    undisturbed = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draw() == undisturbed[0]
    with suppress(KeyError), seeded(5):
        assert draw() == first
        raise KeyError
    assert draw() == undisturbed[1]


def test_numpys_lent_seed_is_the_one_that_its_own_seed_function_gives():
    with seeded(2**40 + 9):
        got = np.random.rand()
    assert got == np.random.RandomState(9).rand()


# ---- erasing ------------------------------------------------------------------------------------


def test_erasing_fills_one_rectangle_of_2_to_33_percent_with_unit_noise():
    areas, noise = [], []
    for seed in range(200):
        image = torch.full((3, 40, 60), 9.0)
        erase(image, 1.0, seed)
        hit = (image != 9).all(0)
        rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        box = hit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert int(hit.sum()) == box.numel()
        areas.append(box.numel() / hit.numel())
        noise.append(image[:, hit])
    assert 0.015 < min(areas) < 0.06
    assert 0.25 < max(areas) < 0.35
    values = torch.cat([n.flatten() for n in noise])
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - 1) < 0.01


def test_erasing_happens_as_often_as_asked_and_depends_on_the_seed_alone():
    def erased(seed, probability=0.3):
        image = torch.zeros(3, 20, 20)
        erase(image, probability, seed)
        return image

    hits = [bool(erased(seed).any()) for seed in range(1000)]
    assert 0.25 < np.mean(hits) < 0.35
    assert torch.equal(erased(4, 1.0), erased(4, 1.0))
    assert not torch.equal(erased(4, 1.0), erased(5, 1.0))
    assert not erased(4, 0.0).any()


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
)
def test_a_balanced_epoch_has_each_class_equally_often_and_each_row_before_any_twice(
    counts, seed, epoch
):
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = epoch_rows(labels, seed, epoch, balanced=True)
    assert len(rows) == len(labels)
    shown = np.bincount(labels[rows], minlength=len(counts))
    assert shown.max() - shown.min() <= 1
    for label in range(len(counts)):
        times = np.bincount(rows[labels[rows] == label], minlength=len(labels))[labels == label]
        assert times.max() - times.min() <= 1
    assert np.array_equal(rows, epoch_rows(labels, seed, epoch, balanced=True))
