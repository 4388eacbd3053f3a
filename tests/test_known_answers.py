"""The instrument, calibrated: whole small studies of drawn children with generators whose worth is
known, from plan to words. The full size is in benchmarks/known_answers.py.
"""

import shutil

import pytest
from cxr_synth.report.contrasts import analyse
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, PlanConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.classify import open_test, stage_experiments
from cxr_synth.images.known_generators import stage_known_generator
from cxr_synth.protocol.plan import TIERS, Cell, load_plan
from cxr_synth.stages.plan import stage_plan


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("known") / "base")
    stage_data(study, DataConfig(patients=800, test_share=0.6, strength=1.175))
    return study


def contrasts(base, folder, kind, monkeypatch):
    "Contrasts on internal of a study with a known generator: {(arm, control): contrast}."
    arms = ["real", "duplicate", "mixed", "oracle", "permuted"]
    monkeypatch.setitem(TIERS, "known", dict(primary=[0.1], cells=[(0.1, 3, 3, arms)], oracles=3))
    monkeypatch.setattr(
        "cxr_synth.stages.plan.tier_cells", lambda *a: [Cell(0.1, 3, 3, tuple(arms))]
    )
    study = Study(shutil.copytree(base.root, folder / kind))
    classify = ExperimentsConfig(size=64, views=2, device="cpu")
    cfg = PlanConfig(tier="known", builtin=kind, pool=200, size=64)
    stage_plan(study, cfg, later=dict(experiments=classify))
    stage_known_generator(study, load_plan(study))
    stage_experiments(study, classify)
    open_test(study)
    return {
        (c["arm"], c["control"]): c
        for c in analyse(study, draws=500)["contrasts"]
        if c["split"] == "internal"
    }


def test_fresh_children_improve(base, tmp_path, monkeypatch):
    found = contrasts(base, tmp_path, "truth", monkeypatch)
    assert found["mixed", "real"]["word"] == "improves"
    assert abs(found["duplicate", "real"]["estimate"]) < 0.05  # more copies of the same are nothing
    assert (
        found["permuted", "real"]["estimate"] < -1
    )  # and wrong labels do harm (clear of chance in benchmarks/known_answers.py)


def test_wrong_labels_worsen(base, tmp_path, monkeypatch):
    assert contrasts(base, tmp_path, "wrong", monkeypatch)["mixed", "real"]["word"] == "worsens"


def test_a_leak_shows_as_oracle_minus_mixed(base, tmp_path, monkeypatch):
    found = contrasts(base, tmp_path, "leaky", monkeypatch)
    # the 95 % interval is clear of 0 with 5 replicates x 6 seeds, see benchmarks/known_answers.py
    assert found["oracle", "mixed"]["low90"] > 0
