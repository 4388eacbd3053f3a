"""What a verdict must survive: lost and edited runs, a single replicate, copies of training films,
replicates that share patients, children with many films, and whoever looks too early.
"""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cxr_synth.base.files import CxrError, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.report.contrasts import analyse
from cxr_synth.report.rehearsal import rehearse_images, rehearse_plan, rehearse_runs
from cxr_synth.stats.intervals import RunScores, auroc_difference, interval_word

TRUTH = {0.1: dict(real=0.80, mixed=0.90)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A study of three replicates whose word is plain."
    study = rehearse_images(
        tmp_path_factory.mktemp("attacks") / "demo", dict(val=10, internal=60, train=20)
    )
    rehearse_plan(study, ((0.1, 3, 2),), ("real", "mixed"))
    rehearse_runs(study, TRUTH)
    return study


@pytest.fixture
def study(whole, tmp_path):
    return Study(shutil.copytree(whole.root, tmp_path / "demo"))


def change_record(study, run, **values):
    "Edit a run's record and its row of results.csv alike, so that the two agree."
    path = study / f"runs/{run}/run.json"
    write_json(path, read_json(path) | values)
    table = pd.read_csv(study / "results.csv", dtype={"generator": str})
    arm, name = run.split("/")
    here = (table.arm == arm) & (table.replicate == int(name[11])) & (table.seed == int(name[-1]))
    assert here.sum() == 1
    for column, value in values.items():
        if column in table:
            table.loc[here, column] = value
    table.to_csv(study / "results.csv", index=False)


def verdict(study):
    return analyse(study, draws=200)


def test_the_whole_study_has_a_word(whole):
    found = verdict(whole)
    assert found["verdict"]["word"] == "improves"
    assert found["verdict"]["generators"].startswith(
        "3 of 3 generators helped; failures of up to 63 %"
    )
    assert found["contrasts"][0]["lost"] == []


@pytest.mark.parametrize("runs", ["real010-rep1-seed0", "real010-rep2-*", "real010-rep[12]-*"])
def test_a_lost_run_never_strengthens_the_word(study, runs):
    "Whichever runs are lost, there is no word, no interval and no p, and they are named."
    for folder in (study / "runs/mixed").glob(runs):
        (folder / "predictions.csv").unlink()
    found = verdict(study)
    first = found["contrasts"][0]
    assert found["verdict"]["word"] is None and not {"low", "p", "word"} & set(first)
    assert first["lost"] and first["lost"][0] in found["verdict"]["sentence"]


def test_a_failed_run_takes_the_word(study):
    change_record(study, "real/real010-rep0-seed1", status="failed", error="out of memory")
    found = verdict(study)
    assert found["verdict"]["word"] is None
    assert "real/real010-rep0-seed1" in found["verdict"]["sentence"]


def test_an_edited_record_drops_no_run(study, whole):
    "A run whose record was made to disagree is named, and stays in the estimate."
    before = verdict(whole)["contrasts"][0]["estimate"]
    change_record(study, "mixed/real010-rep1-seed1", internal_auroc=0.5)
    found = verdict(study)
    first = found["contrasts"][0]
    assert found["verdict"]["word"] is None
    assert first["lost"] == ["mixed/real010-rep1-seed1"] and found["problems"]
    assert first["estimate"] == pytest.approx(before, abs=1e-12)
    assert (first["replicates"], first["seeds"]) == (3, 2)
    arm = next(a for a in found["arms"] if a["arm"] == "mixed")
    assert arm["runs"] == 6 and arm["internal"]["auroc"] > 0.8  # from its predictions


def test_an_edited_table_is_refused(study):
    table = pd.read_csv(study / "results.csv", dtype={"generator": str})
    table.loc[0, "internal_auroc"] = 0.5
    table.to_csv(study / "results.csv", index=False)
    with pytest.raises(CxrError, match="its record says"):
        verdict(study)


def test_who_looks_early_sees_an_estimate_and_no_interval(study):
    "Neither interval nor p can be watched while runs are still to come."
    table = pd.read_csv(study / "results.csv", dtype={"generator": str})
    table[(table.arm != "mixed") | (table.seed < 1)].to_csv(study / "results.csv", index=False)
    found = verdict(study)
    first = found["contrasts"][0]
    assert first["state"] == "unfinished" and len(first["pending"]) == 3
    assert not {"low", "high", "p", "se", "one_minus_p_one_sided"} & set(first)
    assert "interval" not in found["verdict"]["sentence"] and not found["beside"]
    assert found["verdict"]["exchange"] == found["verdict"]["generators"] == ""


@pytest.mark.parametrize("replicates", [1, 2])
@pytest.mark.parametrize("low", [-3, -0.05, 1])
def test_fewer_than_three_replicates_never_get_a_word(replicates, low):
    iv = dict(
        replicates=replicates, seeds=6, zero=[], low=low, high=low + 0.1, low90=low, high90=low
    )
    assert interval_word(iv, 0.5) == "inconclusive"


def test_a_child_with_many_films_has_one_vote():
    "One sick child of twenty has thirty films that an arm ranks worse; by film that is most of it."
    rng = np.random.default_rng(0)
    patients = np.array([*"abcdefghij"] + [f"s{i}" for i in range(19)] + ["many"] * 30)
    labels = np.array([0] * 10 + [1] * 49)
    real = np.tile(labels * 0.3 + rng.uniform(0, 0.5, 59), (3, 2, 1))
    mixed = real.copy()
    mixed[..., 10:29] += 0.3  # every other child is ranked better
    mixed[..., 29:] = 0.0
    a, b = (
        RunScores(np.arange(59), patients, labels, p, [(k, s) for k in range(3) for s in range(2)])
        for p in (mixed, real)
    )
    found = auroc_difference(a, b, 100)
    votes = [np.mean(mixed[0, 0, 10 + i] > mixed[0, 0, :10]) for i in range(19)] + [0.0]
    assert found["arm_auroc"] == pytest.approx(np.mean(votes), abs=1e-12)
    assert found["estimate"] > found["film_estimate"] + 20
    assert found["arm_auroc"] == pytest.approx(a.won.mean(), abs=1e-12)


def made(name, **kind):
    "The judged primary contrast and its plan's rows, of a study that was never written."
    from cxr_synth.report.contrasts import judge, worded_contrasts
    from cxr_synth.report.coverage import StudyKind, made_study

    kind = StudyKind(name, **kind)
    ev = made_study(kind, 0)
    return judge(ev, worded_contrasts(ev.plan), 200, other=False)


SURE = dict(gain=6.0, patients=100, sd_rep=0.2)


def test_copies_never_earn_improves():
    "`mixed` beats `real` beyond doubt, and `copy` does as well."
    primary, gate = made("copies", copy_gain=6.0, **SURE)
    assert primary["low"] > 0 and gate["role"] == "gate" and gate["low"] <= 0
    assert primary["word"] == "inconclusive"
    assert "copies of the real films do as well" in primary["remarks"]
    from cxr_synth.report.contrasts import study_verdict

    said = study_verdict(primary)["sentence"]
    assert "is inconclusive: copies of the real films do as well." in said


def test_what_beats_copies_improves_and_harm_needs_no_gate():
    assert made("beats", copy_gain=0.0, **SURE)[0]["word"] == "improves"
    harm = made("harm", copy_gain=0.0, **SURE | dict(gain=-6.0))
    assert harm[0]["word"] == "worsens"


def test_without_copies_there_is_no_gate():
    [primary] = made("ungated", **SURE)
    assert primary["word"] == "improves"


def test_a_gain_that_was_not_compared_with_copies_does_not_improve():
    "The plan has a gate, and the cell of the contrast has no copies."
    from cxr_synth.report.contrasts import judge, worded_contrasts
    from cxr_synth.report.coverage import StudyKind, made_study

    ev = made_study(StudyKind("ungated", **SURE), 0)
    ev.plan = replace(ev.plan, gate=replace(ev.plan.primary, control="copy"))
    [primary] = judge(ev, worded_contrasts(ev.plan), 200, other=False)
    assert primary["word"] == "inconclusive"
    assert "not compared with copies of the real films" in primary["remarks"]


def test_a_lost_run_of_the_gate_takes_the_word_too():
    from cxr_synth.report.contrasts import judge, worded_contrasts
    from cxr_synth.report.coverage import MadeEvidence, StudyKind, made_study

    kind = StudyKind("gate", copy_gain=0.0, **SURE)
    ev = made_study(kind, 0)
    images = ev.images["internal"]
    probs = {
        arm: np.array(
            [
                [ev.predictions[f"{arm}/real010-rep{k}-seed{s}", "internal"].prob for s in range(6)]
                for k in range(5)
            ]
        )
        for arm in ("real", "copy", "mixed")
    }
    again = MadeEvidence(
        kind.plan(), images.patient_id.to_numpy(), images.label.to_numpy(), probs, [("copy", 3, 2)]
    )
    primary, gate = judge(again, worded_contrasts(ev.plan), 100, other=False)
    assert primary["state"] == gate["state"] == "unfinished"
    assert primary["lost"] == gate["lost"] == ["copy/real010-rep3-seed2"]


def test_replicates_that_share_patients_get_no_word():
    [primary] = made("quarter", fraction=0.25, **SURE)
    assert primary["scope"] == "overlapping" and "word" not in primary and primary["low"] > 0
    [many] = made("eleven", replicates=6, **SURE)  # more than there are blocks at 10 %
    assert "word" not in many


def test_at_half_the_patients_only_the_generator_varies():
    from cxr_synth.report.contrasts import study_verdict

    [primary] = made("half", fraction=0.5, **SURE)
    assert primary["word"] == "improves"
    assert "for these training children; only the generator varies" in primary["remarks"]
    assert "for these training children" in study_verdict(primary)["sentence"]


def test_one_verdict_at_a_time():
    "A study that has answered is not told that it cannot."
    from cxr_synth.report.contrasts import study_verdict

    cannot = dict(can=False, sentence="This study cannot answer.")
    [sure] = made("sure", **SURE)
    assert study_verdict(sure, answer=cannot)["beforehand"] == ""
    [open_] = made("open", patients=20, gain=0.0)
    assert open_["word"] == "inconclusive"
    assert study_verdict(open_, answer=cannot)["beforehand"] == cannot["sentence"]


def test_the_exchange_rate_covers_what_it_promises():
    from cxr_synth.stats.exchange import ExchangeScenario, exchange_coverage

    for K in (5, 10):
        for rate in (1.0, 1.5, 2.5):
            held, above = exchange_coverage(ExchangeScenario(replicates=K), rate, 20_000)
            assert 93.5 <= held <= 95.7 and above <= 3.5


def test_words_of_whole_studies_are_rarely_false():
    "A few dozen; benchmarks/coverage.py counts enough of them."
    from cxr_synth.report.coverage import NO_WORD_KINDS, STUDY_KINDS, word_rates

    rates = word_rates(replace(STUDY_KINDS[3], patients=30), 60)
    assert rates["coverage"] >= 85 and rates["improves"] <= 10
    for kind in NO_WORD_KINDS[1:]:
        found = word_rates(replace(kind, patients=20), 5)
        assert found["improves"] == found["worsens"] == 0
