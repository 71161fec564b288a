"""What replaces what, when a network is missing; each part on its own, a user's own never."""

import time

import pytest

from vitft import fetch, model, offline, recipe
from vitft.errors import MachineError

TEXT = """
data: {root: flower_photos}
model: {name: vitflower_b16, weights: vit_base_patch16_224.orig_in21k, sha256: "01234567"}
offline:
  model: {name: vitflower_s14, weights: bundled}
  data: {root: "sample:flowers"}
"""


def load(tmp_path, *overrides):
    return recipe.parse(TEXT, "r.yaml", tmp_path, list(overrides))


@pytest.fixture
def world(monkeypatch):
    """Switches for what this machine has and reaches."""
    state = {"weights": False, "data": False, "hub": False, "server": False}
    monkeypatch.setattr(model, "cached", lambda spec: state["weights"] or "/" in spec.weights)
    monkeypatch.setattr(fetch, "reachable", lambda host, timeout=0: state["hub"])
    monkeypatch.setattr(
        fetch, "available", lambda name, timeout=0: state["data"] or state["server"]
    )
    return state


@pytest.mark.parametrize(
    ("have", "weights", "root", "count"),
    [
        ((), "bundled", "sample:flowers", 2),
        (("hub",), "vit_base_patch16_224.orig_in21k", "sample:flowers", 1),
        (("weights",), "vit_base_patch16_224.orig_in21k", "sample:flowers", 1),
        (("server",), "bundled", "flower_photos", 1),
        (("data",), "bundled", "flower_photos", 1),
        (("data", "weights"), "vit_base_patch16_224.orig_in21k", "flower_photos", 0),
        (("server", "hub"), "vit_base_patch16_224.orig_in21k", "flower_photos", 0),
    ],
)
def test_each_part_falls_back_on_its_own(world, tmp_path, have, weights, root, count):
    world.update(dict.fromkeys(have, True))
    settled = offline.settle(load(tmp_path))
    assert settled.recipe.model.weights == weights
    assert settled.recipe.data.root == root
    assert len(settled.warnings) == count
    assert all(w.startswith("OFFLINE FALLBACK: ") for w in settled.warnings)


def test_the_fallback_takes_nothing_over_that_belongs_to_the_wanted_weights(world, tmp_path):
    spec = offline.settle(load(tmp_path, "model.drop_rate=0.1")).recipe.model
    assert (spec.name, spec.weights, spec.sha256) == ("vitflower_s14", "bundled", None)
    assert spec.drop_rate == 0.1


def test_a_users_own_folder_and_file_are_never_replaced(world, tmp_path):
    own = load(tmp_path, f"data.root={tmp_path}", f"model.weights={tmp_path}/my.pth")
    settled = offline.settle(own)
    assert settled.recipe == own
    assert settled.warnings == ()


def test_no_fallback_names_every_missing_file_and_where_to_put_it(world, tmp_path):
    with pytest.raises(MachineError) as e:
        offline.settle(load(tmp_path), fallback=False)
    weights, data = e.value.faults
    assert (weights.id, data.id) == ("env.unreachable", "env.unreachable")
    assert weights.place.startswith("r.yaml:3:")
    assert "https://huggingface.co/timm/vit_base_patch16_224.orig_in21k" in weights.fix
    assert "flower_photos.tgz" in data.fix
    assert e.value.exit_code == 5


def test_a_recipe_without_the_block_is_an_error_too(world, tmp_path):
    with pytest.raises(MachineError, match="neither in the hub's cache nor is huggingface.co"):
        offline.settle(load(tmp_path, "offline.model=null"))


def test_two_silent_hosts_cost_the_patience_of_one(world, tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.5)
        return False

    monkeypatch.setattr(fetch, "reachable", slow)
    monkeypatch.setattr(fetch, "available", slow)
    started = time.monotonic()
    offline.settle(load(tmp_path))
    assert time.monotonic() - started < 0.9
    assert offline.PATIENCE < 10
