"""The student who tries twenty settings: each way out is refused, ends in "exploratory", or is counted as an
attempt.
"""

import dataclasses, json, shutil
from typing import Literal, get_args, get_origin

import pytest

from cxr_synth.base.files import CxrError
from cxr_synth.base.ledger import Ledger, ledger_folder, read_chain
from cxr_synth.base.records import Study, as_recorded, move_aside, open_stage
from cxr_synth.base.settings import CONFIGS, PRESETS, DataConfig, ExperimentsConfig, resolve
from cxr_synth.protocol.plan import Contrast, Plan, load_plan
from cxr_synth.protocol.seal import (
    SEALED_STAGES,
    attempts,
    check_sealed,
    deviations,
    left_settings,
    seal_plan,
    seal_state,
)
from cxr_synth.stages.data import stage_data

PLAN = Plan(tier="pilot", primary=Contrast("mixed", "real", 0.1, "internal"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    "A study after its data stage."
    study = Study(tmp_path_factory.mktemp("data") / "s")
    stage_data(study, DataConfig(patients=60, resolution=32))
    return study.root


def later(**settings):
    "Settings of the sealed stages."
    return {s: resolve(s, **settings.get(s, {})) for s in SEALED_STAGES}


def sealed_study(data_folder, root, seed=0, results=True, **settings):
    "A study that was sealed, and whose classifiers were begun."
    study = Study(shutil.copytree(data_folder, root))
    configs = later(**settings)
    plan_stage = open_stage(study, "plan", "plan.json", resolve("plan", seed=seed), adopt=True)
    seal_plan(study, dataclasses.replace(PLAN, seed=seed), configs)
    plan_stage.finish()
    if results:
        begin_runs(study, configs["experiments"])
    return study


def begin_runs(study, config, redo=False):
    "As the experiments stage does, without its work."
    check_sealed(study, experiments=config)
    stage = open_stage(study, "experiments", "runs", config, ["plan.json"], redo)
    (study / "runs/real").mkdir(parents=True, exist_ok=True)
    (study / "runs/real/run.json").write_text("{}")
    study.ledger.append("results", plan_sha256=load_plan(study).sha256)
    stage.finish()


def other_value(config, field):
    "A value that a setting may have, other than the one it has."
    value = getattr(config, field.name)
    kind = field.type
    if kind is bool:
        return not value
    if get_origin(kind) is Literal:
        return next(v for v in get_args(kind) if v != value)
    names = {"base": "sd15", "network": "resnet50", "extractor": "mobilenet-v2"}
    names |= {"finetune_network": "densenet121"}
    names |= {"scheduler": "ddim", "revision": "other", "prompts": ""}
    if isinstance(value, str):
        return names.get(field.name, "other words")
    if value is None:
        return 64 if "int" in str(kind) else 0.5
    if isinstance(value, float):
        return value * 0.75 if value else 0.5
    return value + 8 if field.name in ("size", "resolution") else value + 1


FIELDS = [
    (stage, f)
    for stage in SEALED_STAGES
    for f in dataclasses.fields(CONFIGS[stage])
    if f.name in CONFIGS[stage]().settings() and f.name != "prompts"  # a file: its digest counts
]


@pytest.mark.parametrize(("stage", "field"), FIELDS, ids=lambda x: getattr(x, "name", x))
def test_every_setting_of_every_later_stage_is_sealed(stage, field, tmp_path):
    study = Study(tmp_path / "s")
    study.root.mkdir()
    (study / "plan.json").write_text(
        json.dumps(dict(settings={stage: as_recorded(CONFIGS[stage]())}))
    )
    old = CONFIGS[stage]()
    new = dataclasses.replace(old, **{field.name: other_value(old, field)})
    check_sealed(study, **{stage: old})
    with pytest.raises(CxrError, match=f"sealed with other settings of {stage}") as e:
        check_sealed(study, **{stage: new})
    assert field.name in str(e.value)
    check_sealed(Study(study.root, exploratory=True), **{stage: new})


def test_nothing_is_exploratory_when_all_went_as_sealed(data_folder, tmp_path):
    study = sealed_study(data_folder, tmp_path / "s")
    assert deviations(study) == []
    assert attempts(study) == dict(number=1, of=1, counted=True)
    begin_runs(study, later()["experiments"])  # a second call has nothing to do
    assert deviations(study) == []


def test_other_settings_are_refused_then_marked(data_folder, tmp_path):
    study = sealed_study(data_folder, tmp_path / "s")
    other = ExperimentsConfig(C=0.1)
    with pytest.raises(CxrError, match="sealed with other settings"):
        begin_runs(study, other, redo=True)
    assert deviations(study) == []
    begin_runs(Study(study.root, exploratory=True), other, redo=True)
    found = " ".join(deviations(study))
    assert "runs was made again after classifiers had been trained" in found
    assert "experiments left the sealed settings (C: sealed None, now 0.1)" in found


def redo_runs(study):
    move_aside(study, "runs")
    begin_runs(Study(study.root, exploratory=True), ExperimentsConfig(C=0.1))


def redo_and_delete(study):
    redo_runs(study)
    for path in study.root.glob("*.redo*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def redo_there_and_back(study):
    redo_and_delete(study)
    shutil.rmtree(study / "runs")
    begin_runs(study, later()["experiments"])


def new_plan(study):
    shutil.rmtree(study / "runs")
    (study / "plan.stage.json").unlink()
    stage = open_stage(study, "plan", "plan.json", resolve("plan", seed=5), adopt=True)
    seal_plan(study, dataclasses.replace(PLAN, seed=5), later())
    stage.finish()
    begin_runs(study, later()["experiments"])


def edit_the_ledger(study):
    path = study.ledger.path
    path.write_text(path.read_text().replace('"event": "results"', '"event": "rehearsed"'))


def cut_the_ledger(study):
    lines = study.ledger.path.read_text().splitlines(True)
    study.ledger.path.write_text("".join(lines[:2]))


def delete_the_ledger(study):
    study.ledger.path.unlink()


def delete_both_ledgers(study):
    study.ledger.path.unlink()
    shutil.rmtree(ledger_folder())


def forget_the_opening(study):
    study.ledger.append("opened", tests_sha256="f" * 64)


def edit_the_plan(study):
    values = json.loads((study / "plan.json").read_text())
    values["settings"] = {}
    plan = Plan.from_json(values)
    values["sha256"] = plan.seal
    (study / "plan.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "way",
    [
        redo_runs,
        redo_and_delete,
        redo_there_and_back,
        new_plan,
        edit_the_ledger,
        cut_the_ledger,
        delete_the_ledger,
        delete_both_ledgers,
        forget_the_opening,
        edit_the_plan,
    ],
    ids=lambda way: way.__name__,
)
def test_each_way_out_is_exploratory(way, data_folder, tmp_path):
    study = sealed_study(data_folder, tmp_path / "s")
    way(study)
    assert seal_state(Study(study.root))["exploratory"]


def test_a_plan_may_be_sealed_again_before_any_result(data_folder, tmp_path):
    study = sealed_study(data_folder, tmp_path / "s", results=False)
    (study / "plan.stage.json").unlink()
    stage = open_stage(study, "plan", "plan.json", resolve("plan", seed=5), adopt=True)
    seal_plan(study, dataclasses.replace(PLAN, seed=5), later())
    stage.finish()
    begin_runs(study, later()["experiments"])
    assert deviations(study) == []
    assert attempts(study)["number"] == 1


def test_twenty_folders_are_twenty_attempts(data_folder, tmp_path):
    for n in range(20):
        study = sealed_study(data_folder, tmp_path / f"s{n}", seed=n)
        assert deviations(study) == []
        if n % 3 == 0:
            shutil.rmtree(study.root)  # a folder that is gone has been an attempt all the same
    last = sealed_study(data_folder, tmp_path / "last", seed=20)
    assert attempts(last) == dict(number=21, of=21, counted=True)


def test_other_images_are_no_attempt(data_folder, tmp_path):
    sealed_study(data_folder, tmp_path / "a")
    other = Study(tmp_path / "other")
    stage_data(other, DataConfig(patients=60, resolution=32, seed=1))
    study = sealed_study(other.root, tmp_path / "b")
    assert attempts(study)["of"] == 1


def test_without_a_copy_attempts_are_not_counted(data_folder, tmp_path):
    study = Study(shutil.copytree(data_folder, tmp_path / "s"))
    seal_plan(study, PLAN, later(), copy=False)
    assert not ledger_folder().exists()
    assert attempts(study)["counted"] is False


@pytest.mark.parametrize("cut", [2, 40, 400])
def test_a_ledger_that_was_cut_in_writing_keeps_its_whole_lines(cut, tmp_path):
    ledger = Ledger(tmp_path)
    for n in range(4):
        ledger.append("begun", stage="train", output=f"models/{n}", made_of="a")
    text = ledger.path.read_text()
    entries, problem = read_chain(text[:-cut])
    assert problem
    assert [e["number"] for e in entries] == list(range(1, len(entries) + 1))
    assert len(entries) == text[:-cut].count("\n")


def test_damaged_copies_of_others_do_not_stop_anybody(data_folder, tmp_path):
    ledger_folder().mkdir(parents=True)
    (ledger_folder() / "x.jsonl").write_bytes(b"\xff\x00 no ledger")
    study = sealed_study(data_folder, tmp_path / "s")
    assert attempts(study) == dict(number=1, of=1, counted=True)


def test_sealed_settings_are_those_that_a_stage_takes_by_itself(data_folder, tmp_path):
    study = sealed_study(data_folder, tmp_path / "s", results=False, train=dict(max_train_steps=7))
    found = resolve("train", "tiny", study.recorded("train"))
    assert found.max_train_steps == 7
    assert left_settings(study, "train", as_recorded(found)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_settings_of_every_preset_come_back_from_the_seal(preset):
    for stage in SEALED_STAGES:
        cfg = resolve(stage, preset)
        assert resolve(stage, preset, as_recorded(cfg)) == cfg
