"""Probe and fine-tuning side by side: the same films, patients and synthetic images, judged twice."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from cxr_synth.base.files import CxrError
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, PlanConfig, ReportConfig
from cxr_synth.classify.recipes import RunContext, training_set
from cxr_synth.images.known_generators import stage_known_generator
from cxr_synth.protocol.plan import Run, load_plan
from cxr_synth.stages.classify import stage_experiments
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.plan import COSTS, stage_plan
from cxr_synth.stages.report import stage_report

CLASSIFY = ExperimentsConfig(size=32, views=2, C=0.1, steps=6, batch_size=8, device="cpu")
PLAN = dict(tier="lesson", builtin="truth", pool=12, size=32)
TUNED = ("real-finetune", "copy-finetune", "mixed-finetune")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "The same children twice: without and with fine-tuning beside the probe; runs are done."
    root = tmp_path_factory.mktemp("methods")
    stage_data(Study(root / "data"), DataConfig(patients=120, resolution=32))
    made = []
    for seeds in (0, 1):
        study = Study(shutil.copytree(root / "data", root / f"seeds{seeds}"))
        stage_plan(
            study, PlanConfig(finetune_seeds=seeds, **PLAN), later=dict(experiments=CLASSIFY)
        )
        stage_known_generator(study, load_plan(study))
        stage_experiments(study, CLASSIFY)
        made.append(study)
    return made


def record(study, run):
    return json.loads((study / run.folder / "run.json").read_text())


def test_the_plan_has_three_more_arms_and_no_more_images(studies):
    without, with_them = (load_plan(s) for s in studies)
    more = set(with_them.runs()) - set(without.runs())
    assert {r.arm for r in more} == set(TUNED) and len(more) == 3 * 2 * 1
    assert with_them.generators == without.generators
    assert with_them.primary == without.primary and with_them.secondary == without.secondary


def test_the_probes_are_untouched(studies):
    "Every byte of the probe's predictions is as without the other method."
    for run in load_plan(studies[0]).runs():
        one, two = (s / run.folder / "predictions.csv" for s in studies)
        assert one.read_bytes() == two.read_bytes(), run


def test_what_was_trained(studies):
    study = studies[1]
    for arm in TUNED:
        found = record(study, Run(arm, 0.1, 1, 0))
        assert (found["method"], found["network"]) == ("finetune", "small_cnn")
        assert found["optimizer_steps"] == 6 and (study / f"runs/{arm}").is_dir()
    assert record(study, Run("mixed", 0.1, 1, 0))["method"] == "probe"


def test_both_methods_see_the_same_synthetic_images(studies):
    study = studies[1]
    context = RunContext(study, load_plan(study), CLASSIFY, "cpu")
    probe, tuned = (
        context.of(run).synthetic_images(run, 12)[2]
        for run in (Run("mixed", 0.1, 0, 0), Run("mixed-finetune", 0.1, 0, 0))
    )
    assert probe == tuned
    strata = training_set(
        Run("mixed-finetune", 0.1, 0, 0), context.of(Run("real-finetune", 0.1, 0, 0))
    )
    assert strata.phases[0][0].x.shape[1:] == (32, 32)  # pixels, not features


def by_child(table):
    "AUROC with one vote a child, pair by pair."
    sick, healthy = (table[table.label == label].groupby("patient_id").prob for label in (1, 0))
    wins = [
        np.mean([(a > b) + (a == b) / 2 for a in s for b in h]) for _, s in sick for _, h in healthy
    ]
    return 100 * np.mean(wins)


def test_the_report_shows_both(studies):
    study = studies[1]
    stage_report(study, ReportConfig(draws=50, poster=600))
    analysis = json.loads((study / "analysis.json").read_text())
    found = {(r["arm"], r["control"]): r for r in analysis["methods"]}
    assert {("mixed", "real"), ("copy", "real")} <= set(found)

    def brute(arm, replicate, seeds):
        runs = [Run(arm, 0.1, replicate, s) for s in seeds]
        tables = [pd.read_csv(study / r.folder / "predictions.csv") for r in runs]
        return np.mean([by_child(t[t.split == "internal"]) for t in tables])

    for r in found["mixed", "real"]["replicates"]:
        k = r["replicate"]
        assert np.isclose(r["probe"], brute("mixed", k, range(3)) - brute("real", k, range(3)))
        tuned = brute("mixed-finetune", k, [0]) - brute("real-finetune", k, [0])
        assert np.isclose(r["finetune"], tuned)
    assert not any(c["control"] == "real" and "finetune" in c["arm"] for c in analysis["contrasts"])
    page = (study / "report/index.html").read_text()
    assert (study / "report/figures/methods.png").exists() and "judged by both methods" in page


def test_without_them_the_page_is_silent(studies):
    stage_report(studies[0], ReportConfig(draws=50, poster=600))
    assert "judged by both methods" not in (studies[0] / "report/index.html").read_text()


def test_a_study_that_fine_tunes_already(studies, tmp_path):
    study = Study(shutil.copytree(studies[0].root.parent / "data", tmp_path / "s"))
    later = dict(experiments=ExperimentsConfig(method="finetune", network="small_cnn", size=32))
    with pytest.raises(CxrError, match="(?s)finetune-seeds.*already"):
        stage_plan(study, PlanConfig(finetune_seeds=1, **PLAN), later=later)
    assert not (study / "plan.json").exists()


def test_an_arm_that_would_be_trained_twice(studies, tmp_path):
    "`mixed-finetune` where every arm is fine-tuned is `mixed` under another name."
    study = Study(shutil.copytree(studies[0].root.parent / "data", tmp_path / "s"))
    later = dict(experiments=ExperimentsConfig(method="finetune", network="small_cnn", size=32))
    cfg = PlanConfig(arms="mixed-finetune", **PLAN)
    with pytest.raises(
        CxrError, match="(?s)--plan.arms mixed-finetune.*trained twice.*method probe"
    ):
        stage_plan(study, cfg, later=later)
    assert not (study / "plan.json").exists()
    stage_plan(study, cfg, later=dict(experiments=CLASSIFY))
    assert "mixed-finetune" in load_plan(study).arms


def test_a_network_that_cannot_learn(studies, tmp_path):
    study = Study(shutil.copytree(studies[0].root.parent / "data", tmp_path / "s"))
    later = dict(experiments=ExperimentsConfig(size=32, finetune_network="rad_dino"))
    with pytest.raises(CxrError, match="finetune-network"):
        stage_plan(study, PlanConfig(finetune_seeds=1, **PLAN), later=later)


def test_the_plan_prices_them(studies):
    without, with_them = (load_plan(s).cost["pc_hours"] for s in studies)
    assert np.isclose(with_them - without, 6 * COSTS["finetune"], atol=0.02)
