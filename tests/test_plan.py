"""What a plan may promise: replicates that share nobody, a margin without a floor, a power that knows how
good `real` is already, one answer.
"""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cxr_synth.base.files import CxrError, write_csv, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, PlanConfig
from cxr_synth.classify.feature_store import FeatureStore
from cxr_synth.classify.headroom import Reading, choose_primary, curve_slope, headroom, read_real
from cxr_synth.images.study_images import FRACTIONS, load_manifest, training_rows
from cxr_synth.protocol.plan import (
    BLOCKS,
    TIERS,
    Cell,
    Contrast,
    gate_contrast,
    margin,
    scope_of,
    secondary_contrasts,
    tier_cells,
)
from cxr_synth.protocol.schema import FRACTION_COLUMNS
from cxr_synth.report.contrasts import analyse
from cxr_synth.report.rehearsal import rehearse
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.plan import make_plan, plan_text, read_pilot, stage_plan
from cxr_synth.stats.power import Pilot, assumed_spread, pilot_spread, planned_detectable

TINY = dict(tier="lesson", pool=12, size=32)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = Study(tmp_path_factory.mktemp("plan") / "study")
    stage_data(made, DataConfig(patients=180, resolution=32))
    return made


def curve(low, per_e_fold, sizes=(50, 100, 250, 500)):
    "Readings on a straight learning curve against ln n."
    auroc = [low + per_e_fold * math.log(n / sizes[0]) for n in sizes]
    return [Reading(f, a, n, 0.001) for f, a, n in zip(FRACTIONS, auroc, sizes)]


@pytest.mark.parametrize("per_e_fold", [0.001, 0.01, 0.02])
def test_the_margin_is_what_a_quarter_more_films_would_bring(per_e_fold):
    "On the real set the old margin, half a point, was all that five times the films brought."
    rows = headroom(curve(0.9, per_e_fold), 600, {0.1: (5, 6)})
    quarter = 100 * per_e_fold * math.log(1.25)
    for fraction in (0.05, 0.1, 0.25):
        assert margin(curve_slope(rows, fraction))[0] == pytest.approx(quarter, abs=2e-3)
    assert quarter < 0.5


def test_the_margin_has_a_ceiling_and_is_nothing_where_the_curve_is_flat():
    assert margin(curve_slope(headroom(curve(0.6, 0.1), 600, {}), 0.1))[0] == 1
    for per_e_fold in (0, -0.01):
        rows = headroom(curve(0.9, per_e_fold), 600, {0.1: (5, 6)})
        value, why = margin(curve_slope(rows, 0.1))
        assert value == 0 and "cannot be said" in why
    value, why = margin(curve_slope([], 0.1))
    assert value == 0 and "could not be read" in why


def test_what_can_be_seen_scales_with_what_is_missing_to_one():
    "Half the room above `real`: half the spread, and with no patient error half the difference."
    seen = {a: planned_detectable(0, 600, 5, 6, assumed_spread(a)) for a in (0.9, 0.95, 0.995)}
    assert seen[0.9] == pytest.approx(2 * seen[0.95]) == pytest.approx(20 * seen[0.995])
    assert assumed_spread(0.95)["generator_sd_pp"] == pytest.approx(0.5)
    assert "assumption" in assumed_spread(0.95)["source"]


def test_a_pilot_gives_the_spread_of_its_replicates():
    "From made-up differences with known spreads, through the variances that a report writes."
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        d = rng.normal(0, 0.4, (5, 1)) + rng.normal(0, 0.1, (1, 6))
        means = dict(replicates=d.mean(1), seeds=d.mean(0))
        rows = [dict(factor=f, variance=m.var(ddof=1) / len(m)) for f, m in means.items()]
        found.append(pilot_spread(rows, 5, 6))
    for name, true in (("generator_sd_pp", 0.4), ("seed_sd_pp", 0.1)):
        assert np.mean([f[name] ** 2 for f in found]) ** 0.5 == pytest.approx(true, rel=0.05)
    pilot = Pilot("trial", 0.1, 0.95, 0.4, 0.1, 5)
    assert pilot.spread(0.1, 0.99)["generator_sd_pp"] == 0.4  # the same fraction
    assert pilot.spread(0.05, 0.9)["generator_sd_pp"] == pytest.approx(0.8)


def test_two_replicates_never_promise_an_answer():
    "However much there is to gain."
    rows = headroom(curve(0.5, 0.2), 5000, {0.1: (2, 3)})
    primary, answer = choose_primary(rows, [0.1])
    assert primary == 0.1 and not answer["can"] and "no word" in answer["sentence"]
    primary, answer = choose_primary(headroom(curve(0.5, 0.2), 5000, {0.1: (5, 6)}), [0.1])
    assert answer["can"] and "cannot" not in answer["sentence"]


@pytest.mark.parametrize("readings", [curve(0.9, 0.02), curve(0.9, 0.001), []])
def test_a_plan_gives_one_answer_with_its_figures(readings):
    for tier in ([0.1], [0.05, 0.1]):
        primary, answer = choose_primary(headroom(readings, 600, {}), tier)
        assert set(answer) == {"can", "sentence", "detectable_pp", "headroom_pp"}
        assert (
            primary in tier
            and answer["can"] == ("cannot" not in answer["sentence"])
            or not readings
        )
        if answer["can"]:
            assert answer["headroom_pp"] >= 2 * answer["detectable_pp"]


def test_no_word_about_the_method_at_25_percent():
    assert {scope_of(f, n) for f, n in BLOCKS.items()} == {"method"}
    assert {scope_of(f, n + 1) for f, n in BLOCKS.items()} == {"overlapping"}
    assert scope_of(0.25, 1) == "overlapping"
    assert scope_of(0.5, 5) == scope_of(1.0, 1) == "these children"
    worded = [tier for name, tier in TIERS.items() if name != "guide"]  # see test_tier_guide.py
    assert all(set(tier["primary"]) <= set(BLOCKS) for tier in worded)


def test_more_replicates_than_blocks_are_refused(monkeypatch):
    monkeypatch.setitem(
        TIERS, "greedy", dict(primary=[0.1], cells=[(0.1, 6, 6, ["real"])], oracles=0)
    )
    with pytest.raises(CxrError, match="10 % with 5 replicates or fewer"):
        tier_cells("greedy", 0.1)


@pytest.mark.parametrize("tier", ["pilot", "fair", "full"])
@pytest.mark.parametrize("primary", [0.05, 0.1])
def test_real_is_read_at_the_next_fraction(tier, primary):
    cells = tier_cells(tier, primary)
    main = next(c for c in cells if c.fraction == primary)
    assert Cell({0.05: 0.1, 0.1: 0.25}[primary], main.replicates, 1, ("real",)) in cells
    if tier != "pilot":
        assert (main.replicates, main.seeds) == (BLOCKS[primary], 6)


def test_gate_and_family():
    "The gate needs the arm; pre-training and a smaller dose are named before, where they are planned."
    with_copy = [Cell(0.1, 5, 6, ("real", "mixed", "copy"))]
    assert gate_contrast(with_copy, 0.1) == Contrast("mixed", "copy", 0.1, "internal")
    assert gate_contrast([Cell(0.1, 5, 6, ("real", "mixed"))], 0.1) is None
    for tier, primary in (("fair", 0.1), ("fair", 0.05), ("full", 0.1), ("full", 0.05)):
        family = secondary_contrasts(tier_cells(tier, primary), primary, True)
        for arm in ("pretrain_finetune", "mixed-share25"):
            assert Contrast(arm, "real", primary, "internal") in family
        assert len(family) == 5


def test_the_plan_says_what_replicates_share_and_ends_with_its_seal(study):
    plan = make_plan(study, PlanConfig(tier="fair", pool=12, size=32))
    assert plan.overlap["0.1"] == 0 and 0.3 < plan.overlap["0.25"] < 0.5
    sealed = replace(plan, sha256=plan.seal)
    text = plan_text(sealed)
    assert f"at 25% they share {plan.overlap['0.25']:.0%} of their patients" in text
    last = text.splitlines()[-1]
    assert last == f"Sealed: {plan.seal[:12]}. Write this down, or post it, before you go on."
    for a, b in combinations(range(5), 2):
        rows = [training_rows(study, 0.1, k) for k in (a, b)]
        assert not set(rows[0].patient_id) & set(rows[1].patient_id)


def test_fractions_of_an_older_version_are_refused(study, tmp_path):
    "Independent draws of patients, as they were made before: the replicates overlap."
    copy = Study(tmp_path / "old")
    for name in ("data/manifest.csv", "study.json", "data/stage.json"):
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((study / name).read_bytes())
    t, rng, rows = load_manifest(study), np.random.default_rng(0), []
    t = t[t.split.isin(["train", "val", "internal"])]
    for k in range(10):
        order = dict(zip(t.patient_id.unique(), rng.permutation(t.patient_id.nunique())))
        for r in t.itertuples():
            f = 0.1 if order[r.patient_id] < 0.4 * len(order) and r.split == "train" else 1.0
            rows.append(dict(image_id=r.image_id, replicate=k, min_fraction=f"{f:.2f}"))
    write_csv(copy / "data/fractions.csv", FRACTION_COLUMNS, rows)
    import cxr_synth.stages.plan as stage

    with pytest.raises(CxrError, match="drawn by an older version"):
        stage._measured_overlap(copy, [Cell(0.1, 5, 6, ("real",))], 0.1)


@pytest.fixture(scope="module")
def pilot(tmp_path_factory):
    "A finished study of three replicates, as a report leaves it."
    patients = dict(val=20, internal=60, test=20, train=40)
    made = rehearse(
        tmp_path_factory.mktemp("pilot") / "p", patients, ((0.1, 3, 3),), ("real", "mixed")
    )
    write_json(made / "analysis.json", analyse(made, draws=50))
    return made


def test_a_sealed_pilot_takes_the_place_of_the_assumption(study, pilot):
    cfg = PlanConfig(**TINY, pilot=str(pilot.root))
    row = read_json(pilot / "analysis.json")["contrasts"][0]
    found = read_pilot(cfg, "probe")
    parts = {r["factor"]: r["variance"] for r in row["variance"]}
    assert found.generator_sd_pp == pytest.approx((3 * parts["replicates"]) ** 0.5)
    plan = make_plan(study, cfg)
    assert plan.assumed["generator_sd_pp"] == pytest.approx(found.generator_sd_pp, abs=1e-3)
    assert plan.assumed["source"].startswith("the pilot p ")


def test_a_pilot_that_does_not_fit_is_refused(study, pilot, tmp_path):
    with pytest.raises(CxrError, match="nothing has been planned"):
        read_pilot(PlanConfig(**TINY, pilot=str(study.root)), "probe")
    with pytest.raises(CxrError, match="its method is probe, and here it is finetune"):
        read_pilot(PlanConfig(**TINY, pilot=str(pilot.root)), "finetune")
    other = replace(PlanConfig(**TINY, pilot=str(pilot.root)), network="mobilenet_v2")
    with pytest.raises(CxrError, match="its network is"):
        read_pilot(other, "probe")
    with pytest.raises(CxrError, match="--plan.pilot .* does not exist"):
        stage_plan(study, PlanConfig(**TINY, pilot=str(tmp_path / "none")))
    analysis = (pilot / "analysis.json").read_text(encoding="utf-8")
    plan = read_json(pilot / "plan.json")["sha256"]
    try:
        (pilot / "analysis.json").write_text(analysis.replace(plan, "0" * 64), encoding="utf-8")
        with pytest.raises(CxrError, match="made under another plan"):
            read_pilot(PlanConfig(**TINY, pilot=str(pilot.root)), "probe")
    finally:
        (pilot / "analysis.json").write_text(analysis, encoding="utf-8")


def test_a_film_weighs_the_same_however_many_views_it_has(study):
    "With the same picture in every view, `real` on three views is `real` on one: weight n / V."
    found = []
    for views in (1, 3):
        store = FeatureStore(study, ExperimentsConfig(size=32, views=views), 0, "cpu")
        first = store.view(0)
        store.view = lambda v, first=first: first
        found.append([read_real(store, fraction, 2) for fraction in (0.1, 0.25)])
    for one, three in zip(*found):
        assert three.auroc == pytest.approx(one.auroc, abs=1e-3)
        assert three.se == pytest.approx(one.se, rel=0.02)
