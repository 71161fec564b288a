"""Recipes: strict, located, complete errors; resolved files that mean the same; bounded reading."""

import os
import pickle
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vitft
from vitft import conflicts, draft, recipe, remedies, schema, strict_yaml
from vitft.errors import Fault, RecipeError
from vitft.recipe import dump, load, parse

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))  # test_study has others
FUZZ = settings(
    max_examples=int(os.environ.get("VITFT_FUZZ", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def refused(text: str, *overrides: str, name: str = "r.yaml") -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, name, "/base", overrides)
    assert caught.value.exit_code == 2
    return caught.value


def fault(text: str, *overrides: str):
    """The only fault of a recipe."""
    faults = refused(text, *overrides).faults
    assert len(faults) == 1, [str(f) for f in faults]
    return faults[0]


# --- golden rows: what a reader of a bad recipe is told -------------------------------------------


def test_R1_an_unknown_key_names_the_key_that_was_meant_and_all_are_told_at_once():
    error = refused("moed: head\ntrain:\n  learning_rte: 0.1\n  momentun: 0.9\n")
    assert [(f.id, f.place, f.fix) for f in error.faults] == [
        ("recipe.unknown_key", "r.yaml:1:1: moed", "did you mean mode?"),
        ("recipe.unknown_key", "r.yaml:3:3: train.learning_rte", "did you mean train.lr?"),
        ("recipe.unknown_key", "r.yaml:4:3: train.momentun", "did you mean momentum?"),
    ]


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("lr: 0.1", "did you mean train.lr?"),
        ("train: {learning_rate: 0.1}", "did you mean train.lr?"),
        ("img_size: 224", "did you mean data.image_size?"),
        ("gpu: 0", "did you mean device?"),
        ("export: {qqqqqqq: 1}", "remove it; keys here are as_timm"),
        ("<<: {mode: full}", "remove it; keys here are schema_version"),
    ],
)
def test_R1_a_key_from_elsewhere_is_led_to_its_place(text, fix):
    found = fault(text)
    assert found.id == "recipe.unknown_key"
    assert found.fix.startswith(fix)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", "1.0e-03", ".001"])
def test_R2_exponents_are_numbers_and_survive_the_round_trip(text):
    r = parse(f"train: {{lr: {text}}}")
    assert r.train.lr == 1e-3
    assert parse(dump(r)).train.lr == 1e-3


def test_R2_a_number_in_quotes_is_text_and_the_remedy_says_so():
    found = fault('train:\n  lr: "1e-3"\n')
    assert (found.id, found.place) == ("recipe.type", "r.yaml:2:3: train.lr")
    assert found.text == 'must be a number above 0, got "1e-3"'
    assert found.fix == "take the quotes away: 1e-3"


@pytest.mark.parametrize("value", ["ten", "3.5", "true", "[1]", "{a: 1}", "null", ""])
def test_R3_a_wrong_type_is_told_with_line_rule_and_value(value):
    found = fault(f"train:\n  epochs: {value}\n")
    assert (found.id, found.place) == ("recipe.type", "r.yaml:2:3: train.epochs")
    assert found.text.startswith("must be a whole number of at least 1, got ")
    assert found.fix == "write a value such as 10"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("010", "octal"),
        ("0o17", "octal"),
        ("0x1F", "hexadecimal"),
        ("12:30:45", "base 60"),
        ("1_000", "a number to some YAML readers and text to others"),
        ("yes", "boolean"),
        ("Off", "boolean"),
    ],
)
def test_R4_what_yaml_readers_disagree_about_is_refused_with_the_reason(value, why):
    found = fault(f"mode: head\nmodel:\n  name: {value}\n")
    assert (found.id, found.place) == ("recipe.ambiguous", "r.yaml:3:3: model.name")
    assert value in found.text
    assert why in found.text
    assert found.fix.endswith(f'in quotes: "{value}"')


def test_R4_a_name_that_looks_like_a_number_must_be_quoted_and_stays_as_written():
    found = fault("model: {name: 3.10}")
    assert found.text == "must be text, got 3.10"
    assert found.fix == 'put it in quotes: "3.10"'
    assert parse('model: {name: "3.10"}').model.name == "3.10"
    assert parse("model: {name: 2024-01-01}").model.name == "2024-01-01"


def test_R5_a_key_given_twice_is_refused_with_both_lines():
    found = fault("train:\n  lr: 0.1\n  epochs: 2\n  lr: 0.2\n")
    assert (found.id, found.place) == ("recipe.duplicate_key", "r.yaml:4:3: train.lr")
    assert found.text == "given twice, first in line 2, again in line 4"
    assert found.fix == "keep one of the two lines"


def test_R6_aliases_are_copies_and_keep_their_limits():
    r = parse("model: {name: &n vitflower_s14}\noffline: {model: {name: *n}}")
    assert r.offline.model is not None
    assert r.offline.model.name == "vitflower_s14"
    value = strict_yaml.read("a: &x [1, 2]\nb: *x").value
    assert value == {"a": [1, 2], "b": [1, 2]}
    assert value["a"] is not value["b"]


def test_R7_a_billion_laughs_is_refused_before_it_is_expanded():
    rows = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    rows += [f"{c}: &{c} [{','.join(['*' + p] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi")]  # noqa: B905
    start = time.process_time()
    found = fault("\n".join(rows))
    assert found.id == "recipe.too_large"
    assert "more than 10,000 values" in found.text
    assert time.process_time() - start < 1.0


def test_R7_a_file_beyond_1_MB_is_refused_unread(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("#" * 1_000_001)
    with pytest.raises(RecipeError, match=r"1,000,001 bytes, at most 1,000,000") as caught:
        load(path)
    assert caught.value.faults[0].id == "recipe.too_large"


@pytest.mark.parametrize("text", ["data: &a [*a]", "data: &a {root: *a}", "data: &a\n - [*a]"])
def test_R8_an_alias_inside_what_it_names_is_refused(text):
    found = fault(text)
    assert found.id == "recipe.recursive_alias"
    assert found.place.startswith("r.yaml:")
    assert found.fix == "write the value out"


@pytest.mark.parametrize("opened", ["[", "{a: ", "- "])
def test_R9_deep_nesting_is_refused_at_level_20(opened):
    found = fault("data: " * (opened != "- ") + opened * 2000)
    assert found.id == "recipe.too_deep"
    assert "20 levels" in found.text


def test_R9_aliases_cannot_nest_deeper_than_the_text():
    chain = ["a0: &a0 " + "[" * 15 + "1" + "]" * 15]
    chain += [f"a{k}: &a{k} [[*a{k - 1}]]" for k in range(1, 9)]
    assert fault("\n".join(chain)).id == "recipe.too_deep"


def test_R10_a_tag_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    for tag in ("!!python/object/apply:os.system", "!!python/name:os.system", "!mine", "!!set"):
        found = fault(f"model:\n  name: {tag} ['touch {marker}']\n")
        assert (found.id, found.place) == ("recipe.tag", "r.yaml:2:3: model.name")
        assert tag in found.text
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "id", "place"),
    [
        ("", "recipe.empty", "r.yaml:1:1"),
        ("# only a comment\n", "recipe.empty", "r.yaml:1:1"),
        ("- head\n", "recipe.not_mapping", "r.yaml:1:1"),
        ("head\n", "recipe.not_mapping", "r.yaml:1:1"),
        ("train:\n\tlr: 1\n", "recipe.tab", "r.yaml:2:1"),
        ("mode: head\ntrain: {lr: 1\n", "recipe.syntax", "r.yaml:3:1"),
        ("mode: a: b\n", "recipe.syntax", "r.yaml:1:8"),
        ("mode: head\n---\nmode: full\n", "recipe.syntax", "r.yaml:2:1"),
        ("mode: head\x00\n", "recipe.syntax", "r.yaml:1:11"),
        ('model: {name: "\\ud800"}', "recipe.syntax", "r.yaml:1:9: model.name"),
        ("mode: *nothing\n", "recipe.syntax", "r.yaml:1:7"),
        ("? [a, b]\n: 1\n", "recipe.syntax", "r.yaml:1:3"),
    ],
)
def test_R11_a_text_that_is_no_recipe_gets_one_fault_with_line_and_column(text, id, place):
    found = fault(text)
    assert (found.id, found.place) == (id, place)
    assert found.fix


def test_R11_a_file_that_is_no_recipe_gets_one_fault(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"mode: head\n# caf\xe9\n")
    (tmp_path / "flowers_head.yaml").write_text("mode: head\n")
    os.mkfifo(tmp_path / "fifo.yaml")
    expected = {
        "latin.yaml": ("recipe.encoding", "not UTF-8: byte 0xe9 at offset 16"),
        "flower_head.yaml": ("recipe.missing", "no such file"),
        "fifo.yaml": ("recipe.not_file", "not a regular file"),
        ".": ("recipe.not_file", "not a regular file"),
        "a\0b": ("recipe.unreadable", "cannot be read: embedded null byte"),
    }
    for name, (id, text) in expected.items():
        with pytest.raises(RecipeError) as caught:
            load(tmp_path / name)
        assert [(f.id, f.text) for f in caught.value.faults] == [(id, text)]
        assert name in caught.value.faults[0].place or name == "."
        assert "flowers_head.yaml" in caught.value.faults[0].fix or id == "recipe.encoding"


CONFLICTS = [
    ("mode: full\ntrain: {views: 4}", "train.views: 4", "train.blocks: null", "activations"),
    (
        "mode: full\ntrain: {views: 4, blocks: 2, patch_drop: 0.5}",
        "train.patch_drop: 0.5",
        "train.views: 4",
        "are all there",
    ),
    (
        "mode: full\ntrain: {views: 1, blocks: 2, grad_checkpointing: true}",
        "train.grad_checkpointing: true",
        "train.views: 1",
        "run as they are",
    ),
    (
        "mode: full\ntrain: {views: 2, blocks: 2, mixup: 0.2}",
        "train.mixup: 0.2",
        "train.views: 2",
        "cached activations",
    ),
    ("mode: head\ntrain: {blocks: 2}", "train.blocks: 2", "mode: head", "frozen"),
    ("mode: probe\ntrain: {layer_decay: 0.7}", "train.layer_decay: 0.7", "mode: probe", "frozen"),
    ("mode: head\nmodel: {drop_path_rate: 0.1}", "model.drop_path_rate: 0.1", "mode", "frozen"),
    (
        "train: {sampling: balanced, class_weights: balanced}",
        "train.sampling: balanced",
        "train.class_weights: balanced",
        "twice",
    ),
    ("mode: probe\ntrain: {sampling: balanced}", "train.sampling", "mode: probe", "alike"),
    (
        "mode: probe\ntrain: {class_weights: balanced}",
        "train.class_weights",
        "mode: probe",
        "alike",
    ),
    ("mode: ladder\ntrain: {patch_drop: 0.5}", "train.patch_drop", "mode: ladder", "frozen"),
    ("train: {mixup: 0.2}", "train.mixup: 0.2", "head.views: 1", "cached features"),
    ("head: {views: 1}\ntrain: {reprob: 0.2}", "train.reprob: 0.2", "head.views: 1", "plain"),
    ("head: {views: 1}\ntrain: {augment: rand-m9}", "train.augment", "head.views: 1", "random"),
    ("head: {views: 4}\ntrain: {augment: plain}", "head.views: 4", "train.augment: plain", "equal"),
    ("data: {val: 0.6, test: 0.4}", "data.val: 0.6", "data.test: 0.4", "nothing is left"),
    ("data: {split: tutorial, group: parent}", "data.group", "data.split: tutorial", "groups"),
    ("data: {split: stratified, val: 0}\nmode: probe", "probe.strengths", "data.val: 0", "val"),
    (
        "data: {split: stratified, val: 0}\ntrain: {patience: 3}",
        "train.patience: 3",
        "data.val",
        "",
    ),
    ("train: {epochs: 3, warmup_epochs: 4}", "train.warmup_epochs: 4.0", "train.epochs: 3", ""),
    ("model: {sha256: e5005f0a}", "model.sha256", "model.weights: none", "no file"),
    ("model: {options: {num_classes: 3}}", "model.options.num_classes: 3", "model.name", "itself"),
    (
        "data: {image_size: 32}\nmodel: {options: {img_size: 64}}",
        "model.options.img_size: 64",
        "data.image_size: 32",
        "differ",
    ),
    ("mode: ladder\nladder: {steps: [knn, blocks]}", "ladder.steps", "train.blocks: null", "how"),
]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "mode: probe\ntrain: {lr: 0.1, epochs: 3, workers: 2}",
            "nothing acts on train.epochs, train.lr in mode: probe, where no head is trained; "
            "set mode: head, or remove them",
        ),
        (
            "mode: ladder\nladder: {steps: [knn, ridge]}\ntrain: {lr: 0.1}",
            "nothing acts on train.lr in mode: ladder, where no head is trained; "
            "set mode: head, or remove it",
        ),
        (
            "mode: full\nhead: {views: 2, precision: float32}",
            "nothing acts on head.views in mode: full, where a head learns from no views; "
            "set mode: head, or remove it",
        ),
        (
            "mode: full\nprobe: {kind: ridge}",
            "nothing acts on probe.kind in mode: full, where no head is solved; "
            "set mode: probe, or train.init_head: probe, or remove it",
        ),
        (
            "mode: head\nladder: {stop: false}",
            "nothing acts on ladder.stop in mode: head, where there are no steps; "
            "set mode: ladder, or remove it",
        ),
        ("mode: ladder\ntrain: {lr: 0.1}", None),
        ("mode: full\ntrain: {init_head: probe}\nprobe: {strengths: [1.0]}", None),
        ("mode: probe\nprobe: {kind: ridge}\ntrain: {epochs: 10}", None),  # the default
    ],
)
def test_what_nothing_acts_on_is_said(text, told):
    r = parse(text)
    assert conflicts.idle(r) == (() if told is None else (told,))
    assert conflicts.idle(parse(dump(r))) == conflicts.idle(r)


def test_every_key_of_the_recipes_that_come_along_acts():
    for file in sorted((Path(vitft.__file__).parents[1] / "recipes").glob("*.yaml")):
        assert conflicts.idle(load(file)) == (), file


@pytest.mark.parametrize(("text", "one", "other", "why"), CONFLICTS)
def test_R12_options_that_exclude_each_other_are_told_as_a_pair(text, one, other, why):
    found = fault(text)
    assert found.id == "recipe.conflict"
    left, right = found.text.split(" cannot go with ")
    assert left.startswith(one)
    assert right.startswith(other)
    assert why in right
    assert found.fix


@pytest.mark.parametrize(
    "text",
    [
        "mode: full\ntrain: {blocks: 2, layer_decay: 0.7, mixup: 0.2, reprob: 0.1}",
        "mode: head\nhead: {views: online}\ntrain: {mixup: 0.2, cutmix: 1.0, augment: rand-m9}",
        "mode: head\nhead: {views: 1}",
        "mode: head\nhead: {views: 1}\ntrain: {augment: plain}",
        "mode: ladder\nladder: {steps: [knn, full]}\ntrain: {layer_decay: 0.7}",
        "mode: probe\ndata: {split: stratified, val: 0}\nprobe: {strengths: [1]}",
        "data: {image_size: 32}\nmodel: {options: {img_size: 32}}",
        "data: {split: folders, val: 0, test: 0}",
    ],
)
def test_R12_what_can_be_is_not_forbidden(text):
    parse(text)


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "-.inf"])
def test_R13_a_learning_rate_is_finite_and_above_zero(value):
    found = fault(f"train:\n  lr: {value}\n")
    assert (found.id, found.place) == ("recipe.range", "r.yaml:2:3: train.lr")
    assert found.text == f"must be a number above 0, got {value}"
    assert found.fix == "write a value such as 0.001"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.momentum", "1.5", "a number of at least 0 and below 1"),
        ("train.epochs", "0", "a whole number of at least 1"),
        ("train.batch_size", "0", "a whole number of at least 1 or auto"),
        ("train.ema", "1", "a number above 0 and below 1 or null"),
        ("data.val", "1", "a number of at least 0 and below 1"),
        ("data.background", "[0, 0]", "a list of 3, each a whole number of at least 0"),
        ("data.bit_range", "[3, 1]", "two numbers, the lower one first or null"),
        ("data.group", "((", "parent, or a regular expression with a group"),
        ("data.group", "no_group", "parent, or a regular expression with a group"),
        ("data.group", "'a{99999999999}'", "parent, or a regular expression with a group"),
        ("data.extensions", "[jpg]", "a lower-case suffix such as .jpg"),
        ("probe.strengths", "[]", "a list, each a number above 0"),
        ("ladder.steps", "[knn, knn]", "each once"),
        ("seed", "-1", "a whole number from 0 to 2^63 - 1"),
        ("seed", "9223372036854775808", "a whole number from 0 to 2^63 - 1"),
        ("name", "'../up'", "a plain folder name"),
        ("train.augment", "mixed", "tutorial, plain or a timm policy"),
        ("device", "cuda:x", "auto, cpu, mps, cuda or cuda:N"),
    ],
)
def test_R13_every_range_is_told_in_words(key, value, rule):
    found = fault("mode: head", f"{key}={value}")
    assert found.id in ("recipe.range", "recipe.choice", "recipe.type")
    assert found.place.startswith(f"command line: {key}")
    assert rule in found.text


def test_R14_R15_R18_R19_a_later_check_can_say_where_the_value_was_set():
    r = parse("train:\n  batch_size: 1\n", "r.yaml", overrides=["model.name=vit_tiny"])
    assert r.place("train.batch_size") == "r.yaml:2:3: train.batch_size"
    assert r.place("model.name") == "command line: model.name"
    assert r.place("train.lr") == "default: train.lr"
    assert remedies.nearest("vit_tiny_patch16_24", ["vit_tiny_patch16_224", "resnet50"]) == (
        "vit_tiny_patch16_224"
    )


def test_R16_overrides_go_through_the_same_check_and_say_their_origin():
    error = refused(
        "train:\n  epochs: ten\n",
        *("train.lr=-1", "train.lrr=1", "nonsense", "seed.x=2", "a..b=1", "model.name=[x"),
    )
    assert [(f.id, f.place) for f in error.faults] == [
        ("recipe.type", "r.yaml:2:3: train.epochs"),
        ("recipe.range", "command line: train.lr"),
        ("recipe.unknown_key", "command line: train.lrr"),
        ("recipe.override", "command line: nonsense"),
        ("recipe.unknown_key", "command line: seed.x"),
        ("recipe.override", "command line: a..b"),
        ("recipe.syntax", "command line: model.name"),
    ]
    assert error.faults[2].fix == "did you mean train.lr?"


def test_R16_a_folder_without_its_key_is_told_where_it_belongs(tmp_path):
    error = refused("mode: head\n", str(tmp_path))
    assert error.faults[0].fix == f"write data.root={tmp_path} if these are the photographs"
    with pytest.raises(RecipeError, match=rf"flowers_head.yaml data.root={tmp_path}$"):
        load(tmp_path)


def test_R16_an_override_replaces_what_the_file_says_and_the_last_one_counts():
    text = "train: {lr: oops, epochs: 3}\nmodel: {options: {depth: 2, img_size: 32}}\n"
    r = parse(
        text,
        overrides=["train.lr=0.5", "train.lr=1e-4", "model.options={depth: 4}", "offline=null"],
    )
    assert (r.train.lr, r.train.epochs, r.model.options) == (1e-4, 3, {"depth": 4})
    assert parse(text, overrides=["train.lr=1", "model.options.depth=3"]).model.options == {
        "depth": 3,
        "img_size": 32,
    }
    whole = parse(text, overrides=["train={epochs: 2}"])
    assert whole.place("train.lr") == "default: train.lr"
    assert whole.place("train.epochs") == "command line: train.epochs"
    assert r.overrides[0] == "train.lr=0.5"
    assert r.text == text


def test_R16_a_path_is_not_cut_at_its_number_sign():
    found = fault("mode: head", "data.root=/photos #2")
    assert found.id == "recipe.ambiguous"
    assert parse("mode: head", overrides=['data.root="/photos #2"']).data.root == "/photos #2"


def test_R17_paths_start_at_the_recipe_or_at_the_command_lines_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/someone")
    (there / "r.yaml").write_text(
        "output: out\ndata: {root: photos, split: s.csv, fixes: ../f.csv}\n"
        "model: {weights: ~/w.pth}\noffline: {data: {root: ./flower_photos}}\n"
    )
    r = load(there / "r.yaml", ["output=../runs"])
    assert r.output == tmp_path / "runs"
    assert r.data.root == str(there / "photos")
    assert r.data.split == str(there / "s.csv")
    assert r.data.fixes == str(tmp_path / "f.csv")
    assert r.model.weights == "/home/someone/w.pth"
    assert r.offline.data is not None
    assert r.offline.data.root == str(there / "flower_photos")
    assert r.path == there / "r.yaml"
    assert str(there / "photos") in dump(r)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("data.root", "sample:flowers"),
        ("data.root", "flower_photos"),
        ("data.split", "tutorial"),
        ("model.weights", "bundled"),
        ("model.weights", "none"),
        ("model.weights", "vit_base_patch16_224.orig_in21k"),
        ("model.weights", "hf-hub:timm/vit_base_patch16_224.orig_in21k"),
    ],
)
def test_R17_words_with_a_meaning_are_not_paths(key, word):
    section, leaf = key.split(".")
    r = parse("mode: head", "r.yaml", "/base", [f"{key}='{word}'"])
    assert getattr(getattr(r, section), leaf) == word


def test_R17_dots_go_where_the_file_system_goes(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    assert draft.absolute("link/../x", tmp_path) == str(tmp_path / "real" / "x")
    assert draft.absolute("link/x", tmp_path) == str(tmp_path / "link" / "x")


@pytest.mark.parametrize("path", ["$HOME/photos", "${DATA}/x", "~nobody_here_by_this_name/x"])
def test_R17_variables_are_not_guessed(path):
    found = fault(f"data:\n  root: {path}\n")
    assert (found.id, found.place) == ("recipe.path", "r.yaml:2:3: data.root")
    assert path in found.text


def test_R20_a_recipe_for_a_later_vitft_is_told_both_versions_and_nothing_else():
    found = fault("schema_version: 7\nnew_section: {a: 1}\ntrain: {lr: new, lr: newer}\n")
    assert (found.id, found.place) == ("recipe.schema_version", "r.yaml:1:1: schema_version")
    assert found.text == f"must be at most 1 for vitft {vitft.__version__}, got 7"
    assert "pip install -U vitft" in found.fix


def test_R21_the_nearest_legal_image_sizes():
    assert remedies.nearest_sizes(225, 16) == (224, 240)
    assert remedies.nearest_sizes(224, 16) == (224, 224)
    assert remedies.nearest_sizes(5, 16) == (16, 16)


# --- what holds for every recipe ------------------------------------------------------------------


def test_all_faults_come_in_the_order_of_the_file_command_line_last():
    text = "train: {lr: 0}\nzzz: 1\ndata:\n  val: 2\n  val: 3\nseed: yes\n"
    places = [f.place.split(": ")[0] for f in refused(text, "seed=-1").faults]
    assert places == ["r.yaml:1:9", "r.yaml:2:1", "r.yaml:4:3", "r.yaml:5:3", "r.yaml:6:1"] + [
        "command line"
    ]


def test_every_recipe_that_comes_with_vitft_loads_and_its_resolved_form_means_the_same(tmp_path):
    assert {path.stem for path in RECIPES} >= {"flowers_head", "flowers_full", "flowers_probe"}
    for path in RECIPES:
        wanted = load(path)
        resolved = tmp_path / "recipe.resolved.yaml"
        resolved.write_text(dump(wanted))
        assert load(resolved) == wanted
        assert load(resolved).name == path.stem
        assert path.read_text().startswith("# "), f"{path} says what it does"
        assert f"python -m vitft.run recipes/{path.name}" in path.read_text()


def test_flowers_head_says_what_the_tutorial_did():
    r = next(load(path) for path in RECIPES if path.stem == "flowers_head")
    t = r.train
    assert (r.mode, r.model.name, r.data.root) == ("head", "vitflower_b16", "flower_photos")
    assert r.model.weights == "vit_base_patch16_224.orig_in21k"
    assert (t.opt, t.momentum, t.lr, t.sched, t.min_lr_ratio, t.epochs) == (
        *("momentum", 0.9, 1e-3, "cosine", 0.01),  # timm calls Nesterov sgd
        10,
    )
    assert (r.data.transform, t.augment) == ("tutorial", "tutorial")
    assert r.offline.model == schema.OfflineModel(name="vitflower_s14", weights="bundled")
    assert r.offline.data == schema.OfflineData(root="sample:flowers")


KEYS = """
schema_version name mode seed device output
data.root data.source data.split data.val data.test data.group data.image_size
data.transform data.on_bad
data.max_bad data.background data.bit_range data.icc data.frames data.decoder data.resize
data.max_pixels data.max_aspect
data.extensions data.class_from data.allow_empty data.duplicates data.fixes data.follow_links
model.name model.weights model.sha256 model.global_pool model.drop_rate model.drop_path_rate
model.options
model.embed.backbone model.embed.stage model.embed.patch model.embed.weights model.embed.frozen
head.views head.feature_dtype head.precision
train.epochs train.batch_size train.opt train.lr train.momentum train.weight_decay
train.layer_decay train.sched train.min_lr_ratio train.warmup_epochs train.label_smoothing
train.mixup train.cutmix train.augment train.reprob train.ema train.clip_grad train.accumulate
train.blocks train.views train.activations_gb train.pictures_gb train.tune train.lora_rank
train.lora_alpha train.lora_on train.init_head train.workers train.amp
train.compile train.patience train.class_weights train.sampling train.grad_checkpointing
train.patch_drop train.checkpoint_minutes
probe.kind probe.strengths probe.refit probe.tol probe.max_iter
ladder.steps ladder.stop
trust.calibrate trust.suspects trust.learning_curve trust.audit trust.max_error
trust.foreign_alarms trust.bootstrap trust.head_seeds
report.gallery report.thumbnail report.max_images report.csv_safe
export.as_timm
offline.model.name offline.model.weights offline.data.root
"""


def test_no_key_comes_or_goes_unnoticed():
    assert list(schema.all_keys()) == KEYS.split()


def test_every_key_is_explained_with_rule_and_default():
    reference, config = recipe.describe(), dump(schema.Recipe(), explain=True)
    for key, info in schema.leaves(schema.Recipe):
        assert info.description
        assert f"| `{key}` | " in reference
    assert parse(config) == parse("mode: head")
    assert "  # Peak learning rate. [a number above 0; default 0.001]\n  lr: 0.001\n" in config
    assert "| `train.lr` | a number above 0 | `0.001` | Peak learning rate. |" in reference
    assert "45 defaults" in reference
    assert max(map(len, config.splitlines())) < 1000


def test_the_default_strengths_are_dinov2s_45():
    strengths = schema.STRENGTHS
    assert (len(strengths), strengths[0], strengths[-1]) == (45, 1e-6, 1e5)
    assert strengths[24] == 1.0
    ratios = [b / a for a, b in zip(strengths, strengths[1:], strict=False)]
    assert max(ratios) == pytest.approx(10**0.25, rel=1e-5)
    assert min(ratios) == pytest.approx(10**0.25, rel=1e-5)


def test_an_empty_section_means_its_defaults():
    assert parse("mode: probe\ntrain:\nprobe:\n") == parse("mode: probe")


def test_the_name_comes_from_the_file_unless_the_recipe_has_one():
    assert parse("mode: head", "dir/my köln run².yaml").name == "my-köln-run²"
    assert parse("mode: head", "dir/!!.yaml").name == "recipe"
    assert parse("name: mine", "dir/x.yaml").name == "mine"


def test_a_recipe_is_frozen_and_travels_to_worker_processes():
    r = parse("mode: probe", "r.yaml")
    with pytest.raises(ValueError, match="frozen"):
        r.mode = "full"
    copy = pickle.loads(pickle.dumps(r))
    assert copy == r
    assert copy.place("mode") == "r.yaml:1:1: mode"
    assert r != parse("mode: full", "r.yaml")


# --- many inputs ----------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
)


@FUZZ
@given(st.dictionaries(WORDS, SCALARS | st.lists(WORDS | st.integers(-9, 9), max_size=3)))
@example({"a": "no", "b": "010", "c": "1e-3", "d": "12:30", "": "", "e": "# x", "f": "*x"})
@example({"x": "a: b\n\t\x85\u2028\ufeff\U0001f33b\\ \"'"})
def test_whatever_is_written_reads_back_as_itself(value):
    document = strict_yaml.read(strict_yaml.write(value))
    assert document.problems == ()
    assert document.value == value
    assert repr(document.value) == repr(value)
    assert yaml.safe_load(strict_yaml.write(value)) == value  # other readers agree


@st.composite
def recipes(draw) -> schema.Recipe:
    share = st.floats(0, 0.4)
    data = schema.DataSpec(
        root="/" + draw(st.text("abc é#:'\"- ", min_size=1, max_size=20)),
        val=draw(share),
        test=draw(share),
        image_size=draw(st.none() | st.integers(1, 999)),
        background=draw(st.tuples(*[st.integers(0, 255)] * 3)),
    )
    options = st.dictionaries(
        WORDS.filter(lambda k: k not in conflicts.OURS and k != "img_size"), SCALARS
    )
    model = schema.ModelSpec(name=draw(WORDS.filter(bool)), options=draw(options))
    train = schema.TrainSpec(
        lr=draw(st.floats(0, 1e9, exclude_min=True)),
        batch_size=draw(st.just("auto") | st.integers(1, 999)),
        compile=draw(st.sampled_from(["auto", "reduce-overhead", True, False])),
        ema=draw(st.none() | st.floats(0.1, 0.9)),
    )
    return schema.Recipe(name="x", seed=draw(st.integers(0, 2**63 - 1)), data=data, model=model,
                         train=train)  # fmt: skip


@FUZZ
@given(recipes())
def test_a_dumped_recipe_loads_as_an_equal_one(wanted):
    assert parse(dump(wanted)) == wanted
    assert parse(dump(wanted, explain=True)) == wanted


PIECES = st.sampled_from(
    [*"[]{}:,&*!|>'\"%@`#?- \n\t", "\n  ", ": ", "- ", "&a ", "*a", "<<", "!!int ", "---\n", "..."]
    + ["train", "lr", "data", "root", "model", "options", "mode", "head", "1e-3", "010", "yes"]
    + ["null", "~", ".nan", "\\x", "\ufeff", "\x85", "\U0001f33b", "9" * 50, "schema_version", "2"]
)
TEXTS = st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=80)


def only_recipe_errors(text: str, overrides: list[str]) -> None:
    start = time.process_time()
    faults: tuple[Fault, ...] = ()
    try:
        parse(text, "fuzz.yaml", "/base", overrides)
    except RecipeError as error:
        faults = error.faults
        str(error).encode()
        assert faults  # noqa: PT017  (either outcome is right)
    for found in faults:
        assert found.id.startswith("recipe.")
        assert all((found.place, found.text, found.fix))
    assert time.process_time() - start < 5


@FUZZ
@given(TEXTS)
@example('x: "\\UFFFFFFFF"')
@example("data: {group: '[[a]'}")
@example("%YAML 1.99999999999\n---\na: 1")
def test_no_text_raises_anything_but_recipe_errors(text):
    only_recipe_errors(text, [])


@FUZZ
@given(st.data())
def test_no_mutation_of_a_real_recipe_raises_anything_but_recipe_errors(data):
    text = data.draw(st.sampled_from([path.read_text() for path in RECIPES]))
    for _ in range(data.draw(st.integers(1, 4))):
        a = data.draw(st.integers(0, len(text)))
        b = min(len(text), a + data.draw(st.integers(0, 12)))
        text = text[:a] + data.draw(PIECES) + text[b:]
    only_recipe_errors(text, [])


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([*schema.all_keys(), "train", "data", "x", ""]), TEXTS)))
def test_no_override_raises_anything_but_recipe_errors(pairs):
    only_recipe_errors("mode: head", [f"{key}={value}" for key, value in pairs])
    only_recipe_errors("mode: head", [value for _, value in pairs])


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "x y " * 249_000,
        "a: '" + "x y " * 249_000 + "'",
        "[" * 900_000,
        "- " * 400_000,
        "a:\n" * 300_000,
        "\n" * 900_000,
        "? " * 400_000,
        "&a " * 300_000,
        "".join(f"k{n}: 1\n" for n in range(4_999)),
        "probe: {strengths: [" + "x, " * 9_000 + "1]}",
    ],
    ids=lambda text: repr(text[:8]),
)
def test_the_worst_megabyte_is_refused_within_seconds(text):
    only_recipe_errors(text, [])
