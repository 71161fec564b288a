"""A study changes one thing at a time, compares on the same photographs, and says what holds."""

import csv
from pathlib import Path

import numpy as np
import pytest
from rows import contents

from vitft import charts, recipe, run, study, trials
from vitft.errors import RecipeError
from vitft.stats import Interval, wilson

STUDIES = sorted((Path(recipe.__file__).parents[1] / "recipes" / "studies").glob("*.yaml"))


# --- numbers -------------------------------------------------------------------------------------


def test_one_seed_gives_students_interval_over_photographs():
    m = trials.mean([[1.0, 0.0, 1.0, 1.0, 0.0]])
    # mean 0.6, variance 0.3, standard error sqrt(0.06), t(0.975, 4) = 2.776445
    assert m.estimate == pytest.approx(0.6)
    assert m.interval.high - 0.6 == pytest.approx(2.776445 * 0.06**0.5, rel=1e-6)
    assert (m.seeds, m.photographs) == (1, 5)


def test_seeds_that_disagree_widen_the_interval_by_hand():
    values = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    m = trials.mean(values)
    over_photographs = np.var([0.5, 0.5, 0, 0], ddof=1) / 4  # 1/48
    over_seeds = np.var([0.5, 0.0], ddof=1) / 2  # 1/16
    total = over_photographs + over_seeds
    freedom = total**2 / (over_photographs**2 / 3 + over_seeds**2 / 1)
    from scipy.stats import t

    assert m.interval.high == pytest.approx(0.25 + t.ppf(0.975, freedom) * total**0.5)
    assert m.p == pytest.approx(2 * t.sf(0.25 / total**0.5, freedom))


def test_no_spread_at_all_is_no_certainty_and_shapes_are_checked():
    edge = wilson(0, 3).high  # three photographs alike say little of the fourth
    assert trials.mean(np.zeros((2, 3))) == trials.Mean(0.0, Interval(-edge, edge), 1.0, 2, 3)
    right = trials.mean(np.ones((2, 3)))
    assert right.interval.low == pytest.approx(wilson(3, 3).low)


def test_no_difference_is_larger_than_all_photographs():
    """Two seeds leave Student one degree of freedom, and an interval of thirteen deviations."""
    right = {"a": [[0, 0, 1, 0], [1, 1, 0, 1]], "b": [[1, 1, 0, 1], [0, 0, 1, 0]]}
    (contrast,) = trials.contrasts(right)
    assert contrast.difference.interval.high > 1
    assert contrast.sentence().startswith("a and b are level: 0.0 points [-100.0, 100.0]")
    assert trials.mean(np.ones((2, 3))).p == 0.0
    with pytest.raises(ValueError, match=r"at least \[1, 2\], got \[2, 1\]"):
        trials.mean(np.ones((2, 1)))
    with pytest.raises(ValueError, match="arms differ in shape"):
        trials.contrasts({"a": np.ones((2, 3)), "b": np.ones((2, 4))})


def test_where_there_is_no_difference_few_studies_claim_one():
    rng, claims = np.random.default_rng(0), 0
    for _ in range(400):
        skill = rng.uniform(0.5, 0.9, (2, 3, 1)) * 0.2 + 0.6  # each seed has luck of its own
        hard = rng.uniform(-0.2, 0.2, 60)
        right = rng.uniform(size=(2, 3, 60)) < skill + hard
        claims += trials.contrasts({"a": right[0], "b": right[1]})[0].distinguishable
    assert claims <= 0.05 * 400 + 9  # 2 standard deviations


def test_sentences_say_which_is_better_only_where_it_is():
    a = np.tile(np.arange(200) % 2 == 0, (3, 1))
    b = a | (np.arange(200) % 4 == 1)
    (better,) = trials.contrasts({"plain": a, "other": b})
    assert better.sentence() == (
        "other better than plain by 25.0 points [18.9, 31.1]: distinguishable, p < 0.0001, "
        "3 seeds and 200 photographs"
    )
    (level,) = trials.contrasts({"plain": a, "other": a})
    assert level.sentence() == "plain and other are level: 0.0 points [-1.9, 1.9], 3 seeds and " + (
        "200 photographs"
    )
    (single,) = trials.contrasts({"plain": a[:1], "other": b[:1]})
    assert ": distinguishable for this seed, p < 0.0001, 1 seed and" in single.sentence()


def test_one_seed_takes_the_exact_test_as_compare_does():
    a = np.arange(100)[None] >= 5  # wrong on five photographs that the other has right
    (pair,) = trials.contrasts({"a": a, "b": np.ones((1, 100), bool)})
    assert pair.difference.p == pytest.approx(2 * 0.5**5)
    assert not pair.distinguishable  # Student's t would claim p = 0.025


def test_few_photographs_that_differ_are_judged_by_their_signs():
    a = np.ones((3, 1000), bool)
    a[:, :4] = False  # b has four photographs more, with every seed
    (pair,) = trials.contrasts({"a": a, "b": np.ones((3, 1000), bool)})
    assert pair.difference.p == pytest.approx(2 * 0.5**4)
    assert trials.mean(1.0 - a).p < 0.05  # Student's t alone would claim it
    a[:, :30] = False
    (many,) = trials.contrasts({"a": a, "b": np.ones((3, 1000), bool)})
    assert many.difference.p == pytest.approx(trials.mean(1.0 - a).p)


def test_seeds_that_disagree_keep_the_larger_p():
    a, b = np.ones((2, 100), bool), np.ones((2, 100), bool)
    a[0, :6] = False  # six photographs, with one seed of the two
    (pair,) = trials.contrasts({"a": a, "b": b})
    assert pair.difference.p == trials.mean(b.astype(float) - a).p > 2 * 0.5**6


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("full", [False, True])
def test_every_arm_of_every_study_is_a_recipe_that_loads(path, full, tmp_path):
    plan = study.load(path, full=full)
    splits = {share: tmp_path / f"{share}.csv" for share in plan.shares}
    made = study.trials_of(plan, path, tmp_path, splits, ["data.root=photos"])
    assert len(made) == len(plan.arms) * len(plan.shares) * len(plan.seeds)
    assert len({t.spec.name for t in made}) == len(made)
    assert {t.spec.seed for t in made} == set(plan.seeds)
    assert {t.spec.data.split for t in made} == {str(s) for s in splits.values()}
    text = path.read_text()
    assert f"python -m vitft.study recipes/studies/{path.name}" in text
    arms = {arm: recipe.dump(t.spec) for t in made for arm in [t.arm] if t.seed == plan.seeds[0]}
    assert len(set(arms.values())) == len(arms)


def test_a_user_may_say_an_address_anew_and_only_one(tmp_path):
    (tmp_path / "base.yaml").write_text("mode: probe\ndata: {root: photos}\n")
    a, b, c = (f"data.root=https://host/{name}.tar" for name in "abc")
    plan = study.Plan(
        question="?", base="base.yaml", arms={"x": (), "y": (b,)}, changes=(a, b), seeds=(0,)
    )
    path = tmp_path / "study.yaml"
    assert study.base_recipe(plan, path).data.root == b[10:]
    assert study.base_recipe(plan, path, [c]).data.root == c[10:]
    splits = {1.0: tmp_path / "split.csv"}
    made = study.trials_of(plan, path, tmp_path, splits, [c])
    assert [trial.spec.data.root for trial in made] == [c[10:]] * 2
    with pytest.raises(RecipeError, match=r"data.address.*2 addresses, https://host/b.tar the"):
        study.base_recipe(plan, path, [b, c])


def test_both_studies_are_there():
    assert [p.stem for p in STUDIES] == ["data", "position"]


def written(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    return tmp_path / "s.yaml"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("question: q\nbase: b\narms: {a: []}\n", "arms: Dictionary should have at least 2 items"),
        ("question: q\narms: {a: [], b: []}\nbase: b\nsedes: [1]\n", "sedes: Extra inputs"),
        ("question: q\nbase: b\narms: {a: [lr], b: []}\n", r"arms.a.0: String should match"),
        ("question: q\nquestion: r\n", "line 2"),
        ("question: q\nbase: b\narms: {a: [], b: []}\nshares: [0]\n", "shares.0: Input should be"),
        (
            "question: q\nbase: b\narms: {a: [], b: []}\nseeds: [1, 1]\n",
            "seeds: .*one of them twice",
        ),
    ],
)
def test_faults_of_a_study_file_are_told(tmp_path, text, what):
    with pytest.raises(RecipeError, match=what) as caught:
        study.load(written(tmp_path, text))
    assert caught.value.faults[0].id == "study.file"


def test_a_missing_file_and_a_missing_full_part_are_told(tmp_path):
    with pytest.raises(
        RecipeError, match="study.file.*cannot be read: No such file or dir.*\nfix: na"
    ):
        study.load(tmp_path / "no.yaml")
    path = written(tmp_path, "question: q\nbase: b\narms: {a: [], b: []}\n")
    with pytest.raises(RecipeError, match=f"did you mean {path}"):
        study.load(path.with_stem(path.stem[:-1]))
    with pytest.raises(RecipeError, match=r"study.no_full.*\n.*leave --full out"):
        study.load(path, full=True)


# --- a whole study -------------------------------------------------------------------------------

TEXT = """
question: "Does it matter?"
base: base.yaml
arms:
  "none": ["model.options.pos_embed=none"]
  "2-D": ["model.options.pos_embed=learned2d"]
shares: [0.5, 1.0]
seeds: [0, 1]
changes: ["train.epochs=1"]
"""


@pytest.fixture
def small(tmp_path, tiny_recipe):
    (tmp_path / "base.yaml").write_text(recipe.dump(tiny_recipe("full")))
    return written(tmp_path, TEXT)


def test_a_study_runs_goes_on_and_says_what_it_found(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert study.main([str(small), "--output", str(out)]) == 0
    said, news = capsys.readouterr()
    assert "2 seeds and 9 photographs" in said
    assert news.count("files found") == 1  # once, of the split; runs tell their result
    assert news.count("study: test accuracy") == 8
    assert all("epoch 1" in f.read_text() for f in (out / "runs").glob("*/2*/log.txt"))
    rows = list(csv.DictReader((out / "study.csv").read_text().splitlines()))
    assert [(r["arm"], r["share"], r["trained"], r["seed"]) for r in rows[:4]] == [
        ("none", "0.5", "21", "0"), ("2-D", "0.5", "21", "0"),
        ("none", "0.5", "21", "1"), ("2-D", "0.5", "21", "1"),
    ]  # fmt: skip
    assert rows[-1]["trained"] == "42"
    page = (out / "study.html").read_text()
    assert "Does it matter?" in page
    assert "<svg" in page
    folders = sorted((out / "runs").glob("*/2*"))
    assert len(folders) == 8
    splits = {(f / "split.csv").read_text() for f in folders}
    assert len(splits) == 2  # one for each share
    half, whole = (set(s.splitlines()) for s in sorted(splits, key=len))
    assert half < whole

    def forbidden(spec):
        raise AssertionError(f"{spec.name} was run again")

    monkeypatch.setattr(run, "run", forbidden)
    again = study.study(small, out)
    assert study.sentences(again) == said.splitlines()
    next((tmp_path / "photos" / "red").iterdir()).unlink()  # other photographs, other runs
    with pytest.raises(AssertionError, match="was run again"):
        study.study(small, out)


def test_a_study_is_never_written_below_the_data(small, tmp_path):
    photos = tmp_path / "photos"
    before = contents(photos)
    for out in (photos, photos / "study", photos / "red" / "deep" / "study"):
        with pytest.raises(RecipeError, match=r"cli\.out_in_data.*never writes"):
            study.main([str(small), "--output", str(out)])
    assert contents(photos) == before


def test_one_amount_is_drawn_over_epochs_and_several_over_photographs():
    def outcome(arm, share, seed, right, trained):
        trial = study.Trial(arm, share, seed, recipe.parse("mode: full"))
        run_of = type("R", (), {"split": "test", "labels": ("a",) * len(right)})()
        return study.Outcome(trial, run_of, np.array(right), (0.2, 0.4 + seed / 10), trained, 60.0)

    plan = study.Plan(question="q", base="b", arms={"a": (), "b": ()}, seeds=(0, 1))
    one = [outcome(arm, 1.0, s, [True, False, s == 1], 30) for arm in "ab" for s in (0, 1)]
    found = study.conclude(plan, one)
    assert not any("optimistic" in line for line in study.sentences(found))
    one[0].run.split = "val"
    assert "compared on val, which also chose epochs" in study.sentences(found)[-1]
    drawn = study.chart(found)
    assert (drawn.x_label, drawn.y_label) == ("epoch", "accuracy on val")
    assert drawn.series[0].y == pytest.approx([0.2, 0.45])
    assert drawn.series[0].high == pytest.approx([0.2, 0.5])
    charts.lay_out(drawn)
    two = one + [outcome(arm, 0.5, s, [True, False, False], 15) for arm in "ab" for s in (0, 1)]
    drawn = study.chart(study.conclude(plan, two))
    assert (drawn.x_label, drawn.x_log) == ("training photographs", True)
    assert drawn.series[1].x == [15.0, 30.0]
    assert drawn.series[1].y == pytest.approx([1 / 3, 0.5])
    charts.lay_out(drawn)
