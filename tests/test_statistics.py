"The statistics of the report against libraries that compute the same thing."

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from cxr_synth.stats.auc import delong, mcnemar
from cxr_synth.stats.intervals import holm, t_interval


@pytest.fixture(scope="module", params=[0, 1])
def calls(request):
    "Labels and two classifiers' probabilities; the second set has ties."
    rng = np.random.default_rng(request.param)
    labels = (rng.uniform(size=400) < 0.6).astype(int)
    first, second = (1 / (1 + np.exp(-(labels * m + rng.normal(size=400)))) for m in (1.2, 0.9))
    return labels, *(np.round(p, 2 if request.param else 12) for p in (first, second))


def test_delong_agrees_with_mlstatkit(calls):
    pytest.importorskip("MLstatkit", reason='install the dev extra: pip install -e ".[dev]"')
    from MLstatkit import Delong_test

    labels, first, second = calls
    mine, theirs = delong(labels, first, second), Delong_test(labels, first, second)
    assert abs(mine["difference"] / mine["se"]) == pytest.approx(
        abs(float(theirs[0])), abs=1e-9
    )  # theirs has the other sign
    assert mine["p"] == pytest.approx(float(theirs[1]), abs=1e-9)
    assert mine["difference"] == pytest.approx(
        roc_auc_score(labels, first) - roc_auc_score(labels, second), abs=1e-12
    )


def test_mcnemar_agrees_with_statsmodels(calls):
    tables = pytest.importorskip(
        "statsmodels.stats.contingency_tables",
        reason='install the dev extra: pip install -e ".[dev]"',
    )
    labels, first, second = calls
    right = [(p >= 0.5) == labels for p in (first, second)]
    table = [
        [int((right[0] == a).astype(int) @ (right[1] == b)) for b in (True, False)]
        for a in (True, False)
    ]
    assert mcnemar(*right)["p"] == pytest.approx(
        float(tables.mcnemar(table, exact=True).pvalue), abs=1e-9
    )


def test_holm_agrees_with_statsmodels():
    multi = pytest.importorskip(
        "statsmodels.stats.multitest", reason='install the dev extra: pip install -e ".[dev]"'
    )
    rng = np.random.default_rng(0)
    for n in (1, 3, 8):
        p = rng.uniform(size=n) ** 3
        assert holm(p) == pytest.approx(list(multi.multipletests(p, method="holm")[1]), abs=1e-12)


def test_interval_of_one_factor_is_scipys():
    x = np.random.default_rng(0).normal(1, 2, 12)
    found = t_interval(x.mean(), dict(x=(x.var(ddof=1) / 12, 11)))
    theirs = stats.ttest_1samp(x, 0)
    assert found["p"] == pytest.approx(theirs.pvalue, abs=1e-9)
    assert [found["low"], found["high"]] == pytest.approx(
        list(theirs.confidence_interval()), abs=1e-9
    )


def test_what_a_plan_and_a_report_can_detect_is_one_formula():
    "A finished study with just the assumed spreads detects what the plan of its size said, at every size."
    from cxr_synth.stats.power import assumed_spread, planned_detectable, scaled_detectable

    assumed = assumed_spread(0.95)
    spread = (0.3**2, assumed["generator_sd_pp"] ** 2 / 4, assumed["seed_sd_pp"] ** 2 / 3)
    factors = ("patients", "replicates", "seeds")
    variance = [dict(factor=f, variance=v, df=n) for f, v, n in zip(factors, spread, (99, 3, 2))]
    for row in scaled_detectable(variance, 4, 3):
        planned = planned_detectable(0.3, 100, row["replicates"], row["seeds"], assumed)
        assert row["detectable"] == pytest.approx(planned, abs=1e-12)
