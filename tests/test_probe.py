"""Solved heads against scikit-learn's own solutions, closed forms and brute force."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vitft.errors import DataError
from vitft.neighbours import knn
from vitft.probe import logistic_path, ridge_path
from vitft.schema import STRENGTHS


def table(n=150, d=12, c=3, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(c, d)) * scale
    y = np.arange(n) % c
    x = (centres[y] + rng.normal(size=(n, d)) * rng.uniform(0.5, 3, d)).astype(np.float32)
    return x, y


def objective(x, y, weight, bias, strength):
    """C * sum of losses + |W|^2 / 2 for weights of standardised features, in float64."""
    z = x.astype(np.float64) @ weight.T + bias
    z -= z.max(1, keepdims=True)
    losses = np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]
    return strength * losses.sum() + (weight**2).sum() / 2


def unfolded(probe, x):
    """The head in units of standardised features."""
    scaler = StandardScaler().fit(x.astype(np.float64))
    weight = probe.weight.astype(np.float64) * scaler.scale_
    return scaler.transform(x), weight, probe.bias + probe.weight.astype(np.float64) @ scaler.mean_


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("strength", [1e-6, 1e-3, 0.1, 1.0, 100.0])
def test_the_objective_reached_equals_scikit_learns(classes, strength):
    x, y = table(c=classes)
    ours = logistic_path(x, y, x, y, classes=classes, strengths=(strength,))
    rows, weight, bias = unfolded(ours, x)
    peer = LogisticRegression(C=strength, tol=1e-6, max_iter=10_000).fit(rows, y)
    best = objective(rows, y, peer.coef_, peer.intercept_, strength)
    assert objective(rows, y, weight, bias, strength) <= best * (1 + 1e-4)


def test_strong_heads_on_separable_rows_are_solved_as_far():
    """Losses near 1e-6 per row: a bound on the gradient alone would stop far above the minimum."""
    x, y = table(n=200, d=60, c=4, scale=1.0)
    ours = logistic_path(x, y, x, y, classes=4)
    rows, peer = unfolded(ours, x)[0], LogisticRegression(warm_start=True, max_iter=50_000)
    for row in ours.table[24::5]:
        peer.set_params(C=row["strength"], tol=1e-12).fit(rows, y)
        best = objective(rows, y, peer.coef_, peer.intercept_, row["strength"])
        assert row["objective"] <= best * (1 + 1e-4), row["strength"]


def test_two_classes_are_one_sigmoid():
    x, y = table(c=2)
    ours = logistic_path(x, y, x, y, classes=2, strengths=(0.1,))
    scaler = StandardScaler().fit(x)
    peer = LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000).fit(scaler.transform(x), y)
    z = x @ ours.weight.T + ours.bias
    expected = peer.decision_function(scaler.transform(x))
    np.testing.assert_allclose(z[:, 1] - z[:, 0], expected, atol=2e-2)


def test_every_strength_of_the_path_equals_its_own_solve():
    x, y = table()
    grid = (1e-3, 1e-2, 1e-1, 1.0)
    path = logistic_path(x, y, x, y, classes=3, strengths=grid)
    for row in path.table:
        alone = logistic_path(x, y, x, y, classes=3, strengths=(row["strength"],))
        assert alone.table[0]["objective"] == pytest.approx(row["objective"], rel=1e-4)
    assert [row["strength"] for row in path.table] == list(grid)


def test_the_grid_is_dinov2s():
    assert len(STRENGTHS) == 45
    assert STRENGTHS[0] == pytest.approx(1e-6)
    assert STRENGTHS[-1] == pytest.approx(1e5)


def test_val_chooses_by_log_loss_and_ties_go_to_the_smaller_strength():
    x, y = table()
    v, w = table(seed=1)
    path = logistic_path(x, y, v, w, classes=3, strengths=(1e-4, 1e-2, 1.0, 1e3))
    losses = [row["val_loss"] for row in path.table]
    assert path.strength == path.table[int(np.argmin(losses))]["strength"]


def test_the_same_call_gives_the_same_bits():
    x, y = table(n=200, d=30)
    a, b = (logistic_path(x, y, x, y, classes=3, strengths=(0.01, 1.0)) for _ in range(2))
    np.testing.assert_array_equal(a.weight, b.weight)
    np.testing.assert_array_equal(a.bias, b.bias)


@pytest.mark.parametrize(("n", "d"), [(20, 64), (300, 4)])
def test_more_features_than_rows_and_the_other_way(n, d):
    x, y = table(n=n, d=d)
    head = logistic_path(x, y, x, y, classes=3, strengths=(0.01, 1.0))
    assert np.isfinite(head.weight).all()
    assert ((x @ head.weight.T + head.bias).argmax(1) == y).mean() > 0.5


def test_a_constant_feature_gets_no_weight():
    x, y = table()
    x[:, 3] = 7.0
    head = logistic_path(x, y, x, y, classes=3, strengths=(1.0,))
    assert np.abs(head.weight[:, 3]).max() == 0


def test_a_class_without_rows_is_never_named():
    x, y = table()
    head = logistic_path(x, y, x, y, classes=4, strengths=(1.0,))
    assert head.weight.shape == (4, 12)
    assert ((x @ head.weight.T + head.bias).argmax(1) != 3).all()


def test_refitting_uses_val_too():
    x, y = table()
    v, w = table(seed=1)
    both = np.concatenate([x, v]), np.concatenate([y, w])
    refit = logistic_path(x, y, v, w, classes=3, strengths=(0.1,), refit=True)
    whole = logistic_path(*both, v, w, classes=3, strengths=(0.1,))
    np.testing.assert_allclose(refit.weight, whole.weight, atol=1e-6)


def test_what_cannot_be_solved_is_said():
    x, y = table()
    x[3, 2] = np.nan
    with pytest.raises(DataError, match=r"features.nonfinite.*1 of 150 rows"):
        logistic_path(x, y, x, y, classes=3)
    with pytest.raises(DataError, match="class"):
        logistic_path(table()[0], np.zeros(150, int), *table(), classes=3)


def test_ridge_equals_its_closed_form():
    x, y = table()
    head = ridge_path(x, y, x, y, classes=3, strengths=(0.5,))
    z = StandardScaler().fit_transform(x.astype(np.float64))
    targets = np.eye(3)[y]
    centred = targets - targets.mean(0)
    weight = np.linalg.solve(z.T @ z + np.eye(12) / 0.5, z.T @ centred).T
    expected = z @ weight.T + targets.mean(0)
    np.testing.assert_allclose(x @ head.weight.T + head.bias, expected, atol=1e-4)


def test_neighbours_equal_brute_force():
    x, y = table()
    q, _ = table(n=9, seed=3)
    found = knn(x, y, x, y, q, classes=3, ks=(10,), temperature=0.07)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    near = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ unit.T
    for scores, cosine in zip(found.scores, near, strict=True):
        which = np.argsort(-cosine)[:10]
        votes = np.bincount(y[which], np.exp(cosine[which] / 0.07), minlength=3)
        np.testing.assert_allclose(scores, votes / votes.sum(), atol=1e-5)
    assert found.k == 10
