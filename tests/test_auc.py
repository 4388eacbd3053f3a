"""One AUROC and one threshold wherever they are asked for; no NaN or infinity in any JSON; a
distance that is never negative.
"""

import json

import numpy as np, pytest
from sklearn.metrics import roc_auc_score, roc_curve
from cxr_synth.classify import runs
from cxr_synth.quality import metrics
from cxr_synth.report import contrasts
from cxr_synth.stats import auc
from cxr_synth.base.files import CxrError, null_for_nan, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.stats.intervals import RunScores


def small_sets(n=400):
    "Small val sets: few images, scores with ties, both classes."
    rng = np.random.default_rng(0)
    for _ in range(n):
        size = rng.integers(2, 14)
        labels = np.append(rng.integers(0, 2, size), [0, 0, 1, 1])
        yield labels, np.round(rng.random(size + 4), rng.integers(1, 3))


# -- thresholds


def test_the_report_and_the_runs_use_one_threshold():
    "What run.json calls its threshold is what the report calls Youden's, in every small val set."
    import pandas as pd

    for labels, probs in small_sets():
        table = pd.DataFrame(dict(split="val", label=labels, prob=probs))
        assert (
            runs.at_threshold(table)["threshold"] == auc.three_thresholds(labels, probs)["youden"]
        )


def test_thresholds_are_finite_and_as_good_as_any():
    """Of all cuts, also the one at infinity, none has a better balanced accuracy, and no equally
    good one is nearer 0.5.
    """
    for labels, probs in small_sets():
        cut = auc.youden_threshold(labels, probs)
        wrong, right, cuts = roc_curve(labels, probs, drop_intermediate=False)
        gain = (probs >= cut)[labels == 1].mean() - (probs >= cut)[labels == 0].mean()
        assert (
            np.isfinite(cut)
            and cut in probs
            and gain == pytest.approx((right - wrong).max(), abs=1e-12)
        )
        rivals = cuts[(right - wrong >= gain - 1e-12) & np.isfinite(cuts)]
        assert abs(cut - 0.5) <= np.abs(rivals - 0.5).min()


def test_a_ranking_upside_down_has_a_finite_threshold():
    found = auc.three_thresholds(np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.8, 0.9]))
    assert found == {"0.5": 0.5, "youden": 0.1, "sens95": 0.1}


def test_sensitivity_threshold_is_the_highest_that_finds_enough():
    for labels, probs in small_sets(100):
        cut = auc.sensitivity_threshold(labels, probs, 0.95)
        assert (probs >= cut)[labels == 1].mean() >= 0.95
        assert all((probs >= c)[labels == 1].mean() < 0.95 for c in probs[probs > cut])


# -- AUROC


def test_every_auroc_is_the_same_number():
    "In results.csv, in the audit and in the paired intervals: equal to the last bit."
    for labels, probs in small_sets(100):
        found = {
            auc.auroc(labels, probs),
            auc.score(labels, probs)["auroc"],
            auc.fold_auc(labels == 1, probs, np.zeros(len(labels), int))[0],
        }
        names = np.arange(len(labels)).astype(str)
        found |= set(
            RunScores(names, names, labels, probs[None, None], [(0, 0)]).aurocs.ravel().tolist()
        )
        assert len(found) == 1 and found.pop() == pytest.approx(
            roc_auc_score(labels, probs), abs=1e-12
        )


def by_children(labels, patients, scores):
    "One child, one vote, as it is defined: pair of patients by pair of patients."
    films = {c: {p: scores[(labels == c) & (patients == p)] for p in patients} for c in (0, 1)}
    sick, healthy = ([f for f in films[c].values() if len(f)] for c in (1, 0))
    won = [(np.sign(a[:, None] - b) + 1).mean() / 2 for a in sick for b in healthy]
    return np.mean(won)


def test_one_child_has_one_vote():
    "Against the definition, with ties and children of both classes; and it is not the count of films."
    rng, apart = np.random.default_rng(2), 0
    for labels, probs in small_sets(60):
        patients = rng.integers(0, 6, len(labels))
        found = auc.patient_auroc(labels, patients, probs)
        assert found == pytest.approx(by_children(labels, patients, probs), abs=1e-12)
        value, influence = auc.patient_influence(labels, patients, probs)
        assert value == pytest.approx(found, abs=1e-12)
        assert influence.sum() == pytest.approx(0, abs=1e-12)
        apart += abs(found - auc.auroc(labels, probs)) > 0.02
    assert apart > 20


def test_delong_is_the_formula_over_all_pairs():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [30, 20])
    first, second = (np.round(labels + rng.normal(size=50), 1) for _ in range(2))

    def won(p):
        return (np.sign(p[labels == 1][:, None] - p[labels == 0]) + 1) / 2

    by_hand = won(first) - won(second)
    found = auc.delong(labels, first, second)
    assert found["difference"] == pytest.approx(by_hand.mean(), abs=1e-12)
    assert found["se"] == pytest.approx(
        np.sqrt(by_hand.mean(1).var(ddof=1) / 20 + by_hand.mean(0).var(ddof=1) / 30), abs=1e-12
    )


@pytest.mark.parametrize(
    "labels, scores, said",
    [
        ([1, 1], [0.1, 0.2], "both classes"),
        ([0, 2], [0.1, 0.2], "both classes"),
        ([0, 1], [0.1, np.inf], "not finite"),
        ([0, 1, 1], [0.1, 0.2], "one label for each image"),
    ],
)
@pytest.mark.parametrize(
    "ask", [auc.auroc, auc.placements, auc.youden_threshold, auc.sensitivity_threshold]
)
def test_what_cannot_be_ranked_is_refused(ask, labels, scores, said):
    with pytest.raises(CxrError, match=said):
        ask(labels, scores)


# -- scores


def test_scores_of_calls_are_scikit_learns_to_the_last_bit():
    import sklearn.metrics as m

    for labels, probs in small_sets():
        for threshold in (0.1, 0.5, 1.0):
            calls = (probs >= threshold).astype(int)
            found = auc.score(labels, probs, threshold)
            theirs = dict(
                accuracy=m.accuracy_score(labels, calls),
                balanced_accuracy=m.balanced_accuracy_score(labels, calls),
                sensitivity=m.recall_score(labels, calls),
                specificity=m.recall_score(labels, calls, pos_label=0),
                f1=m.f1_score(labels, calls, zero_division=0),
                mcc=m.matthews_corrcoef(labels, calls),
            )
            assert {name: found[name] for name in theirs} == theirs


def test_a_score_that_is_added_is_scored_recorded_and_reported(monkeypatch):
    from cxr_synth.protocol.schema import result_columns

    toy = auc.Score("called ill", "How many are called ill?", lambda y, p, calls: calls.mean())
    monkeypatch.setitem(auc.SCORES, "alarms", toy)
    assert auc.score([0, 1, 1, 1], [0.1, 0.6, 0.7, 0.2])["alarms"] == 0.5
    assert result_columns()[-1] == "test_alarms"


@pytest.mark.parametrize("room", ["stats", "protocol"])
def test_statistics_and_protocol_load_no_torch_and_ask_for_no_pandas(room):
    import ast, subprocess, sys
    from pathlib import Path

    paths = sorted(Path(auc.__file__).parents[1].joinpath(room).glob("[!_]*.py"))
    names = [f"cxr_synth.{room}.{p.stem}" for p in paths]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            asked += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"torch", "pandas"} & {name.split(".")[0] for name in asked}, path


# -- numbers in files


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_json_holds_finite_numbers(tmp_path, bad):
    path = tmp_path / "x.json"
    write_json(path, dict(value=1.5))
    with pytest.raises(CxrError, match=r"\['rows'\]\[1\]\['low'\]"):
        write_json(path, dict(rows=[dict(low=0.5), dict(low=bad)]))
    assert read_json(path) == dict(value=1.5)  # the old file is still there
    write_json(path, null_for_nan(dict(rows=[dict(low=0.5), dict(low=bad)], pair=(bad, 2))))
    assert json.loads(path.read_text()) == dict(
        rows=[dict(low=0.5), dict(low=None)], pair=[None, 2]
    )


def test_what_was_not_measured_is_shown_as_a_dash():
    assert [contrasts.format_number(x) for x in (None, float("nan"), -0.5)] == ["–", "–", "−0.50"]
    assert [contrasts.format_pp(x) for x in (None, float("nan"), 1.234, 0.001)] == [
        "–",
        "–",
        "+1.23",
        "0.00",
    ]


# -- Fréchet distance


def test_frechet_distance_is_never_negative():
    rng, found = np.random.default_rng(0), []
    for n, d in ((5, 40), (40, 5), (30, 200), (2, 3)):
        for scale in (1, 100):
            x = scale * rng.normal(size=(n, d)) + scale
            spread = np.square(x).sum()
            found += [metrics.frechet_distance(x, y) / spread for y in (x, x[::-1], x + 1e-12)]
            found.append(
                metrics.frechet_moments(x.mean(0), np.cov(x.T), x.mean(0), np.cov(x.T)) / spread
            )
    assert min(found) >= 0 and max(found) < 1e-7
