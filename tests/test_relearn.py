"""Heads learned again: each photograph is judged by a head that never saw it, and that pays."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitft import learn, prepare, probe, relearn, trust
from vitft.evaluate import Predictions
from vitft.learn import Hooks, Learned
from vitft.stats import log_softmax


def plan(labels, split):
    """What `_folded` needs of a run."""
    labels, split = np.asarray(labels), np.asarray(split)
    index = SimpleNamespace(
        labels=labels,
        classes=tuple("abcdefgh"[: labels.max() + 1]),
        rows=lambda name: np.flatnonzero(split == name),
    )
    probe_spec = SimpleNamespace(max_iter=200, refit=False)
    return SimpleNamespace(
        index=index,
        recipe=SimpleNamespace(seed=0, probe=probe_spec),
        device=torch.device("cpu"),
        test_split="test",
    )


def test_nobody_is_judged_by_a_head_that_saw_it_or_its_group():
    labels = np.arange(60) % 3
    p = plan(labels, ["train"] * 40 + ["val"] * 15 + ["test"] * 5)
    groups = [i // 2 for i in range(60)]
    judged = []

    def judge(known, others):
        assert not {groups[i] for i in known} & {groups[i] for i in others}
        assert len(known) + len(others) == 55
        judged.extend(others.tolist())
        return np.eye(3)[labels[others]]

    found = relearn._folded(p, ("train", "val"), lambda: np.array(groups), judge)
    assert sorted(judged) == list(range(55))
    np.testing.assert_array_equal(found.logits.argmax(1), found.labels)
    assert found.on == "photographs of train and val, each judged by a head that never saw it"


def test_a_class_that_only_one_fold_holds_is_left_out():
    labels = [0] * 10 + [1] * 10 + [2]
    p = plan(labels, ["train"] * 21)
    found = relearn._folded(
        p, ("train",), lambda: np.arange(21), lambda _, others: np.zeros((len(others), 3))
    )
    assert len(found.labels) == 20
    assert set(found.labels) == {0, 1}


def test_folds_that_would_learn_one_class_are_none():
    p = plan([0] * 10 + [1], ["train"] * 11)
    assert (
        relearn._folded(p, ("train",), lambda: np.arange(11), lambda *_: np.zeros((1, 2))) is None
    )


@pytest.fixture
def made(tiny_recipe):
    """(mode, *overrides) -> a learned tiny run, its answers on val, its plain features."""
    from vitft.findings import all_features
    from vitft.run import predict_split

    def make(mode, *overrides):
        p = prepare.prepare(tiny_recipe(mode, *overrides), fallback=False)
        learned = learn.learn(p, Hooks())
        val = predict_split(p, learned, "val")
        return p, learned, val, all_features(p, learned, [])

    return make


def ask(p, learned, val, x):
    return relearn.held_out(p, learned, val, x, lambda: np.arange(len(x)))


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_few_photographs_of_val_are_joined_by_folds_of_train(made, kind):
    p, learned, val, x = made("probe", f"probe.kind={kind}")
    assert learned.solved == kind
    found = ask(p, learned, val, x)
    used = len(p.index.rows("train")) + len(p.index.rows("val"))
    assert len(found.labels) == used
    assert np.isfinite(found.logits).all()
    again = ask(p, learned, val, x)
    np.testing.assert_array_equal(found.logits, again.logits)


def test_many_photographs_of_val_are_enough(made, monkeypatch):
    p, learned, val, x = made("probe")
    monkeypatch.setattr(relearn, "ENOUGH", len(val.labels))
    found = ask(p, learned, val, x)
    assert found.on == "photographs of val"
    assert found.logits is val.logits


def test_a_head_that_learned_from_val_is_judged_by_one_that_did_not(made, monkeypatch):
    p, learned, val, x = made("probe", "probe.refit=true")
    assert relearn.val_is_known(p, learned)
    monkeypatch.setattr(relearn, "ENOUGH", 1)
    found = ask(p, learned, val, x)
    train, rows = p.index.rows("train"), p.index.rows("val")
    y = p.index.labels
    alone = probe.logistic_path(
        x[train], y[train], x[rows], y[rows], classes=3, strengths=(learned.best["strength"],)
    )
    np.testing.assert_allclose(found.logits, x[rows] @ alone.weight.T + alone.bias, atol=0.02)
    assert not np.allclose(found.logits, val.logits, atol=0.05)
    assert found.on == "photographs of val, judged by a head of the train photographs alone"


def test_a_val_that_the_head_knows_is_never_the_spare_one(made, monkeypatch):
    monkeypatch.setattr(relearn, "_folded", lambda *_: None)  # as of a class with one photograph
    p, learned, val, x = made("probe", "probe.refit=true")
    found = ask(p, learned, val, x)
    fitted = trust.fit_temperature(found.logits, found.labels, found.on)
    assert (fitted.value, fitted.n) == (1.0, 0)
    assert "fitted on 0 photographs, as the head knows them all" in fitted.sentence()
    p, learned, val, x = made("probe")
    assert ask(p, learned, val, x).logits is val.logits


def test_a_trained_heads_folds_stand_beside_its_own_val(made):
    p, learned, val, x = made("head")
    assert not relearn.val_is_known(p, learned)
    before = {k: v.clone() for k, v in p.net.state_dict().items()}
    found = ask(p, learned, val, x)
    train = len(p.index.rows("train"))
    assert len(found.labels) == train + len(val.labels)
    np.testing.assert_array_equal(found.logits[train:], val.logits)
    np.testing.assert_array_equal(found.labels[train:], val.labels)
    assert all(torch.equal(before[k], v) for k, v in p.net.state_dict().items())


@pytest.mark.parametrize("start", ["fresh", "zero", "probe"])
def test_heads_trained_again_begin_as_the_runs_own_did(made, monkeypatch, start):
    """No step moves them far, so what they end as is what they began as."""
    still = ["train.lr=1e-12", "train.epochs=1", "trust.head_seeds=2", "probe.strengths=[0.01]"]
    p, learned, _, _ = made("head", f"train.init_head={start}", *still)
    train, views, val = p.index.rows("train"), learned.train_views, learned.features["val"]
    some, own = np.arange(len(train))[::2], p.net.get_classifier()
    head = relearn._trained(p, learned, views, 5, some)
    asked, logistic_path = [], probe.logistic_path

    def noted(x, *args, **kwargs):
        asked.append(x)
        return logistic_path(x, *args, **kwargs)

    monkeypatch.setattr(probe, "logistic_path", noted)
    relearn.head_seeds(p, learned)
    found = relearn._trained(p, learned, views, 5)
    if start == "fresh":
        assert 0.01 < float(head.weight.detach().std()) < 0.03
        assert not torch.allclose(own.weight, found.weight, atol=1e-3)
        return
    assert torch.allclose(own.weight, found.weight, atol=1e-8)
    if start == "zero":
        assert float(head.weight.detach().abs().max()) < 1e-8
        return
    assert [len(x) for x in asked] == [len(train)] * 3
    y = p.index.labels[train]
    alone = logistic_path(views.x[0][some], y[some], val.x[0], val.y, classes=3, strengths=(0.01,))
    np.testing.assert_allclose(head.weight.detach().numpy(), alone.weight, atol=1e-6)


@pytest.mark.parametrize("mode", ["probe", "head"])
def test_what_is_scored_stays_out(made, mode):
    p, learned, val, x = made(mode, "data.test=0")
    assert p.test_split == "val"
    found = ask(p, learned, val, x)
    assert len(found.labels) == len(p.index.rows("train"))
    assert found.on == "photographs of train, each judged by a head that never saw it"


def test_a_trained_backbone_leaves_val_alone(made):
    p, learned, val, x = made("full")
    assert x is None
    assert ask(p, learned, val, x).logits is val.logits


def test_a_ladders_trained_step_has_not_learned_from_val(made):
    p, learned, _, _ = made("probe", "probe.refit=true")
    assert not relearn.val_is_known(p, replace(learned, solved=""))


def test_folds_give_a_better_temperature_than_a_small_val():
    """The claim itself, where the truth is known: 60 photographs to learn, 15 to choose."""
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 0.45, (4, 24))
    worse = {"none": [], "val": [], "folds": []}
    for seed in range(12):
        y = np.random.default_rng(seed).integers(0, 4, 2075)
        x = (centres[y] + np.random.default_rng(seed + 100).normal(0, 1, (2075, 24))).astype("f4")
        p = plan(y, ["train"] * 60 + ["val"] * 15 + ["test"] * 2000)
        fitted = probe.logistic_path(x[:60], y[:60], x[60:75], y[60:75], classes=4)
        learned = Learned((), {"strength": fitted.strength}, {}, True, solved="logistic")
        logits = x @ fitted.weight.T + fitted.bias
        val = Predictions(logits[60:75], y[60:75])
        found = relearn.held_out(p, learned, val, x, lambda: np.arange(2075))
        ways = {"none": 1.0, "val": trust.fit_temperature(val.logits, val.labels).value}
        ways["folds"] = trust.fit_temperature(found.logits, found.labels).value
        for way, t in ways.items():
            worse[way].append(-log_softmax(logits[75:], t)[np.arange(2000), y[75:]].mean())
    none, val, folds = (np.mean(worse[way]) for way in ("none", "val", "folds"))
    assert folds < val
    assert folds < none
