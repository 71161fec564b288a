"""What the findings share: one head of all photographs, one way to keep copies together."""

import pytest

from vitft import curve, findings, learn, prepare
from vitft.learn import Hooks


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
