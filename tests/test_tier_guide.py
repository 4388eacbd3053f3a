"""The tier `guide`: its seven arms with one generator of all the children, from plan to report; the guide's
table, and no word about the method.
"""

import shutil

import numpy as np
import pandas as pd
import pytest
from cxr_synth.base.files import CxrError
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import PRESETS, DataConfig, GuideConfig, PlanConfig, resolve
from cxr_synth.guide import GUIDE_EXPERIMENTS, stage_guide
from cxr_synth.images.study_images import training_rows
from cxr_synth.protocol.plan import Plan, Run, guide_arms, load_plan, tier_cells
from cxr_synth.protocol.seal import SEALED_STAGES
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.plan import (
    make_plan,
    plan_cost,
    plan_text,
    planned_generators,
    pool_sizes,
    read_pilot,
)
from cxr_synth.stages.run import run, run_stage

from conftest import SMALL

POOL = 12
SETTINGS = SMALL | {
    "data": {"patients": 150, "resolution": 32},
    "plan": {"tier": "guide", "pool": POOL, "size": 32},
    "quality": {"size": 32, "halvings": 2, "max_images": 6},
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    "A study of the tier whose runs are done, and whose test is shut."
    study = run(tmp_path_factory.mktemp("guide") / "s", until="data", **SETTINGS)
    configs = {stage: resolve(stage, "tiny", **values) for stage, values in SETTINGS.items()}
    later = {stage: configs[stage] for stage in SEALED_STAGES}
    run_stage(study, "plan", configs["plan"], later=later)
    return run(study, until="experiments", **SETTINGS)


@pytest.fixture(scope="module")
def shut(sealed):
    "Its report before the test is opened."
    run_stage(sealed, "report", resolve("report", "tiny", **SETTINGS["report"]))
    return read_json(sealed / "analysis.json"), page_of(sealed)


@pytest.fixture(scope="module")
def finished(sealed, shut):
    "The same study to its end."
    return run(sealed, **SETTINGS)


def page_of(study):
    return (study / "report/index.html").read_text(encoding="utf-8")


def test_one_generator_of_all_children_and_seven_arms_three_times(sealed):
    plan = load_plan(sealed)
    (generator,) = plan.generators
    assert generator.name == "real100-rep0"
    assert generator.images == {"normal": POOL // 2, "pneumonia": POOL // 2}
    assert {(r.fraction, r.arm) for r in plan.runs()} == {*guide_arms(POOL).values()}
    assert len(plan.runs()) == 7 * 3
    assert {plan.generator_of(r) for r in plan.runs()} == {"real100-rep0"}
    folders = sorted(p.name for p in (sealed / "models").glob("*/") if p.is_dir())
    assert folders == ["real100-rep0"]


def test_no_run_predicts_a_child_that_it_or_its_generator_has_seen(sealed):
    "The generator has seen the internal patients, so not even the runs at 10 % may predict them."
    manifest = pd.read_csv(sealed / "data/manifest.csv", dtype=str).set_index("image_id")
    seen = set(training_rows(sealed, 1.0, 0).patient_id)
    assert seen == set(manifest[manifest.split.isin(["train", "internal"])].patient_id)
    for r in load_plan(sealed).runs():
        for name in ("predictions.csv", "test.csv"):
            table = pd.read_csv(sealed / r.folder / name, dtype=str)
            assert not set(table.patient_id) & seen, (r.folder, name)
            assert set(table.split) == ({"test"} if name == "test.csv" else {"val"})


def test_before_the_opening_there_is_no_verdict_and_no_table(shut):
    analysis, page = shut
    assert analysis["test"]["state"] == analysis["contrasts"][0]["state"] == "sealed"
    assert analysis["verdict"]["word"] is None
    assert analysis["verdict"]["sentence"].startswith("No verdict yet")
    assert "FINAL RESULTS SUMMARY" not in page


def test_the_verdict_says_plainly_that_there_is_no_word(finished):
    analysis = read_json(finished / "analysis.json")
    primary, verdict = analysis["contrasts"][0], analysis["verdict"]
    asked = [primary[k] for k in ("role", "arm", "control", "fraction", "split", "state")]
    assert asked == ["primary", "mixed", "real", 1.0, "test", "measured"]
    assert primary["scope"] == "these children" and (primary["replicates"], primary["seeds"]) == (
        1,
        3,
    )
    assert primary["low"] <= primary["estimate"] <= primary["high"]
    assert verdict["word"] is None and not any("word" in c for c in analysis["contrasts"])
    assert verdict["sentence"].startswith("No word about the method: at 100 %")
    assert "one synthetic set" in verdict["sentence"]
    assert "cannot be said" in verdict["exchange"] and "--plan.tier fair" in verdict["beforehand"]
    assert analysis["margin_pp"] == 0


def test_the_primary_is_the_mean_difference_of_the_runs(finished):
    "By hand, from the sealed predictions: the mean over seeds, by patient."
    manifest = pd.read_csv(finished / "data/manifest.csv", dtype=str).set_index("image_id")
    aucs = {"real": [], "mixed": []}
    for arm, found in aucs.items():
        for seed in range(3):
            folder = finished / Run(arm, 1.0, 0, seed).folder
            t = pd.read_csv(folder / "test.csv", dtype={"image_id": str}).set_index("image_id")
            label = manifest.label[t.index].astype(int)
            sick, healthy = (
                [g.prob.to_numpy() for _, g in t[label == y].groupby("patient_id")] for y in (1, 0)
            )
            pairs = [(np.sign(a[:, None] - b[None]).mean() + 1) / 2 for a in sick for b in healthy]
            found.append(np.mean(pairs))
    expected = 100 * (np.mean(aucs["mixed"]) - np.mean(aucs["real"]))
    estimate = read_json(finished / "analysis.json")["contrasts"][0]["estimate"]
    assert estimate == pytest.approx(expected, abs=1e-6)


def test_the_guides_table_is_that_of_the_runs(finished):
    text = (finished / "report/guide-table.txt").read_text(encoding="utf-8")
    results = pd.read_csv(finished / "results.csv")
    for name, (fraction, arm) in guide_arms(POOL).items():
        runs = results[(results.arm == arm) & np.isclose(results.real_fraction, fraction)]
        assert len(runs) == 3
        cell = f"{runs.test_accuracy.mean():.4f} ± {runs.test_accuracy.std(ddof=0):.4f}"
        assert any(x.startswith(name + " ") and cell in x for x in text.splitlines()), name
    assert "no p above says anything of the next one" in text
    page = page_of(finished)
    assert "FINAL RESULTS SUMMARY" in page and "No word about the method" in page


def test_the_opening_is_logged_once_and_not_exploratory(finished):
    log = read_json(finished / "opened.json")
    assert [x["exploratory"] for x in log["opened"]] == [False]
    assert read_json(finished / "analysis.json")["seal"]["exploratory"] == []


def test_the_guides_own_protocol_runs_on_its_generator(finished, tmp_path):
    "`cxr-synth guide` after the opening: seven arms by three seeds, and its section in the report."
    study = Study(shutil.copytree(finished.root, tmp_path / "s"))
    cfg = GuideConfig(network="small_cnn", size=32, epochs=1, pretrained=False, device="cpu")
    stage_guide(study, cfg)
    rows = pd.read_csv(study / "guide/results.csv")
    assert sorted(rows.arm.unique()) == sorted(f"guide-{name}" for name in GUIDE_EXPERIMENTS)
    assert rows.groupby("arm").seed.nunique().eq(3).all()
    assert study.record("guide")["generator"] == "real100-rep0"
    counts = rows.groupby("arm").n_synthetic.first()
    assert counts["guide-baseline"] == 0 and counts["guide-synth_100"] == POOL


def test_it_is_no_pilot_of_another_study(finished):
    "One replicate measures no spread between generators."
    with pytest.raises(CxrError, match="tier guide. weighed nothing at its primary fraction"):
        read_pilot(PlanConfig(pilot=str(finished.root)), "probe")


def test_the_plan_prints_an_evening_and_what_it_cannot_say(tmp_path):
    study = Study(tmp_path / "s")
    stage_data(study, DataConfig(patients=150, resolution=32), preset="a100-80gb")
    plan = make_plan(study, resolve("plan", "a100-80gb"))
    assert plan.tier == "guide" and plan.generators[0].images == {"normal": 1200, "pneumonia": 1200}
    cells = tier_cells("fair", 0.1)
    fair = Plan(generators=planned_generators(study, cells, pool_sizes(study, 2400), 5))
    assert 1 < plan.cost["gpu_hours"] < 2 < 8 < plan_cost(fair, "a100-80gb", 0)["gpu_hours"]
    text = plan_text(plan)
    assert f"1 generator, 2,400 images; about {plan.cost['gpu_hours']:g} GPU hours" in text
    assert "cannot say whether the method helps" in text and "--plan.tier fair" in text
    assert "mixed minus real at 100% on test" in text


def test_it_is_the_default_of_the_guides_card_alone():
    guide = {name for name in PRESETS if resolve("plan", name).tier == "guide"}
    assert guide == {"a100-80gb", "a100-80gb-lora", "a100-40gb"}
    assert resolve("plan", "a100-80gb", tier="fair").tier == "fair"


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(CxrError, match="--plan.primary 0.1 do not go together"):
        PlanConfig(tier="guide", primary="0.1")
    with pytest.raises(CxrError, match="--plan.finetune-seeds 2 do not go together"):
        PlanConfig(tier="guide", finetune_seeds=2)
    study = Study(tmp_path / "s")
    stage_data(study, DataConfig(patients=60, resolution=32, test_share=0.0))
    with pytest.raises(CxrError, match="this data set has none"):
        make_plan(study, PlanConfig(tier="guide", pool=POOL))
