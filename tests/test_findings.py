"""What the findings share: one head of all photographs, one way to keep copies together."""

import numpy as np
import pytest
from PIL import Image

from vitft import curve, findings, learn, prepare, relearn
from vitft.learn import Hooks
from vitft.run import predict_split


@pytest.fixture
def made(tiny_recipe):
    """(*overrides) -> a learned tiny probe and its plain features."""

    def make(*overrides):
        p = prepare.prepare(tiny_recipe("probe", *overrides), fallback=False)
        learned = learn.learn(p, Hooks())
        return p, learned, findings.all_features(p, learned, [])

    return make


def test_the_head_of_all_photographs_is_solved_once(made, monkeypatch):
    monkeypatch.setattr(findings, "SMALLEST_CLASS", 8)
    p, learned, x = made("trust.learning_curve=true")
    sizes, solve = [], findings.head_fit

    def counted(*args, **keys):
        fit = solve(*args, **keys)

        def one(rows, labels, others):
            sizes.append(len(labels))
            return fit(rows, labels, others)

        return one

    monkeypatch.setattr(findings, "head_fit", counted)
    growth, gains = findings._growth(p, learned, x, [])
    train, val, y = p.index.rows("train"), p.index.rows("val"), p.index.labels
    assert sizes.count(len(train)) == 1
    sides, fit = (x[train], y[train], x[val], y[val]), solve(p, learned, steps=findings.CURVE_STEPS)
    assert growth == curve.learning_curve(*sides, fit=fit, classes=3, seed=p.recipe.seed)
    alone = curve.class_gains(*sides, fit=fit, classes=p.index.classes, seed=p.recipe.seed)
    assert gains == tuple(sorted(alone, key=lambda g: -g.loss))


@pytest.mark.parametrize("audit", ["true", "false"])
def test_folds_keep_copies_together_whether_the_report_tells_of_them_or_not(
    made, tiny_photos, monkeypatch, audit
):
    """One photograph twice, byte for byte, and once more in other bytes."""
    first = tiny_photos / "red" / "red_00.jpg"
    first.with_name("same.jpg").write_bytes(first.read_bytes())
    Image.open(first).save(first.with_name("saved_again.jpg"), quality=80)
    groups = {}

    def judged(p, learned, val, x, given):
        groups["temperature"] = given()
        return relearn.HeldOut(val.logits, val.labels, "photographs")

    def doubted(*_, **keys):
        groups["suspects"] = keys["groups"]

    monkeypatch.setattr(findings, "held_out", judged)
    monkeypatch.setattr(findings.suspects, "find", doubted)
    p, learned, _ = made(f"trust.audit={audit}", "trust.suspects=true")
    val = predict_split(p, learned, "val")
    found = findings.find(p, learned, val, val)
    assert (found.links is None) == (audit == "false")
    np.testing.assert_array_equal(groups["temperature"], groups["suspects"])
    names = [path.rpartition("/")[2] for path in p.index.paths]
    copies = [names.index(n) for n in ("red_00.jpg", "same.jpg", "saved_again.jpg")]
    assert len(set(groups["suspects"][copies].tolist())) == 1
    assert len(set(groups["suspects"].tolist())) == len(names) - 2
