"From file to verdict: what was edited, swapped or lost between two stages is named, and what was lost heals."

import json, shutil

import numpy as np
import pytest
from PIL import Image

from cxr_synth.base.checksums import Checksums
from cxr_synth.base.files import CxrError, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import FORMAT, STAGES, Study, stale_stages
from cxr_synth.stages.run import run, run_stage

GENERATOR = "real010-rep0"
SET = f"synthetic/{GENERATOR}"


def replace_text(study, rel, old, new):
    path = study / rel
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def rows(study, rel="data/manifest.csv"):
    return [line.split(",") for line in (study / rel).read_text().splitlines()]


def image_of(study, split):
    table = rows(study)
    at = table[0].index("split")
    return next(f"data/images/{row[0]}.png" for row in table[1:] if row[at] == split)


def move_patient(study):
    "A patient of the test becomes one of training."
    table = rows(study)
    at = table[0].index("split")
    for row in table[1:]:
        if row[at] == "test":
            row[at] = "train"
            break
    (study / "data/manifest.csv").write_text("".join(",".join(row) + "\n" for row in table))


def swap_label(study):
    table = rows(study)
    at = table[0].index("label")
    table[1][at] = str(1 - int(table[1][at]))
    (study / "data/manifest.csv").write_text("".join(",".join(row) + "\n" for row in table))


def another_fraction(study):
    replace_text(study, "data/fractions.csv", ",0.1", ",0.5")


def other_prepared_image(study):
    shutil.copy(study / image_of(study, "test"), study / image_of(study, "train"))


def one_grey_level(study):
    path = study / image_of(study, "train")
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def real_for_synthetic(study):
    shutil.copy(study / image_of(study, "test"), study / SET / "normal/000000.png")


def real_for_synthetic_with_its_digest(study):
    "As careful as can be: the line of metadata has the new digest."
    real_for_synthetic(study)
    new = Checksums(study.root)[f"{SET}/normal/000000.png"]
    path = study / SET / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["sha256"] = new
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def swapped_labels(study):
    path = study / SET / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["label"] = 1 - line["label"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def flag_removed(study):
    (study / SET / "flags.csv").write_text("file_name,reason,by\nnormal/000000.png,dull,person\n")


def other_weights(study):
    weights = "unet/diffusion_pytorch_model.safetensors"
    other = study / "models/real010-rep1/normal" / weights
    shutil.copy(other, study / f"models/{GENERATOR}/normal" / weights)


def other_class(study):
    folder = study / f"models/{GENERATOR}"
    (folder / "normal").rename(folder / "x")
    (folder / "pneumonia").rename(folder / "normal")
    (folder / "x").rename(folder / "pneumonia")


def other_generator(study):
    shutil.rmtree(study / f"models/{GENERATOR}")
    shutil.copytree(study / "models/real010-rep1", study / f"models/{GENERATOR}")


def prediction(study):
    path = next((study / "runs").glob("mixed/*/predictions.csv"))
    text = path.read_text().splitlines()
    text[1] = text[1].rpartition(",")[0] + ",0.5"
    path.write_text("\n".join(text) + "\n")


def score_in_run_record(study):
    path = next((study / "runs").glob("mixed/*/run.json"))
    write_json(path, read_json(path) | dict(val_auroc=0.99))


def quality_value(study):
    path = study / f"quality/{GENERATOR}.json"
    found = read_json(path)
    found[0]["value"] = 0.0
    write_json(path, found)


def copy_added(study):
    with open(study / f"quality/{GENERATOR}-copies.csv", "a") as file:
        file.write("normal/000000.png,near,copy report\n")


DATA = (move_patient, swap_label, another_fraction, other_prepared_image, one_grey_level)
DRAWN = (real_for_synthetic, real_for_synthetic_with_its_digest, swapped_labels)
MODELS = (other_weights, other_class, other_generator)
ALTERED = [  # what was done, the stage that must refuse, what its message names
    *[(act, stage, "data/") for act in DATA for stage in ("data", "plan", "train", "experiments")],
    *[(act, "quality", "data/") for act in DATA if act is not another_fraction],
    *[(act, stage, SET) for act in DRAWN for stage in ("generate", "quality", "experiments")],
    (flag_removed, "experiments", f"{SET}/flags.csv"),
    *[(act, stage, GENERATOR) for act in MODELS for stage in ("train", "generate")],
    *[(act, "report", "data/") for act in DATA],
    *[(act, "report", SET) for act in DRAWN],
    *[(act, "report", GENERATOR) for act in MODELS],
    *[
        (act, stage, "runs/mixed")
        for act in (prediction, score_in_run_record)
        for stage in ("open-test", "report")
    ],
    (prediction, "experiments", "predictions.csv"),
    (quality_value, "report", f"quality/{GENERATOR}.json"),
    (copy_added, "quality", f"{GENERATOR}-copies.csv"),
]


@pytest.mark.parametrize("act, stage, names", ALTERED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_altered_files_are_named(study_copy, act, stage, names):
    act(study_copy)
    with pytest.raises(CxrError) as e:
        run_stage(study_copy, stage)
    assert names in str(e.value).replace("\\", "/")
    says = ("was changed", "record of", "Restore it from a copy")
    assert any(words in str(e.value) for words in says)
    assert "copy" in str(e.value) or "belongs" in str(e.value)  # the next step


@pytest.mark.parametrize(
    "act", [real_for_synthetic, swapped_labels, other_prepared_image, quality_value]
)
def test_a_whole_run_refuses_too(study_copy, act, cxr_synth_command):
    act(study_copy)
    said = cxr_synth_command("run", study_copy.root)
    assert said.status == 2 and "was changed" in said.err
    assert "was changed" in cxr_synth_command("status", study_copy.root).out


def test_before_a_stage_ever_ran(study_copy):
    "The next stage checks what it reads even if it has no record of its own yet."
    shutil.rmtree(study_copy / "runs")
    for name in ("results.csv", "opened.json"):
        (study_copy / name).unlink()
    real_for_synthetic(study_copy)
    with pytest.raises(CxrError, match="was changed"):
        run_stage(study_copy, "experiments")
    assert not (study_copy / "runs").exists()


def test_a_set_without_its_record(study_copy):
    (study_copy / SET / "stage.json").unlink()
    with pytest.raises(CxrError, match="no record says who wrote it"):
        run_stage(study_copy, "quality")


def test_the_same_pixels_pass(study_copy):
    "Another version of a PNG library writes other bytes for the same picture."
    for path in list((study_copy / "data/images").glob("*.png"))[:5]:
        image = Image.open(path)
        image.load()
        image.save(path, compress_level=1)
    run(study_copy, until="quality")
    assert stale_stages(study_copy) == []


def test_nothing_is_hashed_twice(study_copy):
    assert stale_stages(study_copy) == []
    again = Study(study_copy.root)
    assert stale_stages(again) == [] and not again.checksums.new


LOST = [
    ("study.json", "data"),
    ("data/manifest.csv", "data"),
    ("data/audit.json", "data"),
    ("plan.json", "plan"),
    (f"{SET}/normal/000001.png", "generate"),
    (f"{SET}/metadata.jsonl", "generate"),
    (f"quality/figures/{GENERATOR}-grid.png", "quality"),
    ("report/index.html", "report"),
    ("cache/checksums.json", "plan"),
]


@pytest.mark.parametrize("rel, stage", LOST)
def test_what_was_lost_heals(study_copy, rel, stage):
    before = study_copy.digest(rel)
    (study_copy / rel).unlink()
    run_stage(study_copy, stage)
    assert stale_stages(study_copy) == []
    if rel not in ("study.json", "report/index.html", "cache/checksums.json"):
        assert study_copy.digest(rel) == before
    assert all(r["status"] == "complete" for r in study_copy.records().values())


def test_a_lost_prepared_image_and_lost_predictions(study_copy):
    image = image_of(study_copy, "train")
    predictions = next((study_copy / "runs").glob("mixed/*/predictions.csv"))
    old = predictions.read_bytes()
    (study_copy / image).unlink()
    predictions.unlink()
    with pytest.raises(CxrError, match="missing"):
        run_stage(study_copy, "open-test")
    run(study_copy, until="experiments")
    assert predictions.read_bytes() == old and (study_copy / image).exists()
    assert [line for line in stale_stages(study_copy) if not line.startswith("report")] == []


def test_lost_results_and_flags(study_copy):
    before = (study_copy / "results.csv").read_text()
    (study_copy / "results.csv").unlink()
    run_stage(study_copy, "experiments")
    run_stage(study_copy, "open-test")
    assert (study_copy / "results.csv").read_text() == before
    assert len(read_json(study_copy / "opened.json")["opened"]) == 1
    (study_copy / SET / "flags.csv").unlink()
    shutil.rmtree(study_copy / "quality")
    with pytest.raises(CxrError, match=f"move {SET} away"):
        run_stage(study_copy, "quality")


def test_other_data_do_not_replace_lost_tables(study_copy):
    path = study_copy / "data/stage.json"
    record = read_json(path)
    record["files"]["manifest.csv"] = "0" * 64
    write_json(path, record)
    (study_copy / "data/manifest.csv").unlink()
    with pytest.raises(CxrError, match="made of other data"):
        run_stage(study_copy, "data")
    assert not (study_copy / "data/manifest.csv").exists()


def test_models_that_served_are_not_trained_again(study_copy, capsys):
    shutil.rmtree(study_copy / "models")
    run(study_copy, until="generate")
    assert not (study_copy / "models").exists()
    assert "not trained" in capsys.readouterr().out
    assert stale_stages(study_copy) == []


def test_a_lost_model_that_is_needed_is_named(study_copy):
    shutil.rmtree(study_copy / f"models/{GENERATOR}/normal")
    (study_copy / SET / "normal/000000.png").unlink()
    with pytest.raises(CxrError, match="move models/real010-rep0 away"):
        run_stage(study_copy, "generate")


def test_opened_json_lost(study_copy, cxr_synth_command):
    (study_copy / "opened.json").unlink()
    said = cxr_synth_command("report", study_copy.root)
    assert said.status == 2 and "opened.json" in said.err and "exploratory" in said.err
    assert cxr_synth_command("open-test", study_copy.root).status == 0
    assert read_json(study_copy / "opened.json")["opened"][-1]["exploratory"]


def test_edited_results_are_written_again(study_copy):
    before = (study_copy / "results.csv").read_text()
    table = rows(study_copy, "results.csv")
    table[1][table[0].index("internal_auroc")] = "0.9999"
    (study_copy / "results.csv").write_text("".join(",".join(row) + "\n" for row in table))
    with pytest.raises(CxrError, match="results.csv"):
        run_stage(study_copy, "report")
    run_stage(study_copy, "experiments")
    assert (study_copy / "results.csv").read_text() == before


def test_edited_test_scores_are_written_again(study_copy):
    before = (study_copy / "results.csv").read_text()
    table = rows(study_copy, "results.csv")
    table[1][table[0].index("test_auroc")] = "0.9999"
    (study_copy / "results.csv").write_text("".join(",".join(row) + "\n" for row in table))
    with pytest.raises(CxrError, match="results.csv"):
        run_stage(study_copy, "report")
    run_stage(study_copy, "open-test")
    assert (study_copy / "results.csv").read_text() == before


RECORDS = [
    "data/stage.json",
    "plan.stage.json",
    f"models/{GENERATOR}/stage.json",
    f"{SET}/stage.json",
    "quality/stage.json",
    "runs/stage.json",
    "report/stage.json",
]
LACKING = [
    ("format", None, "another version"),
    ("format", FORMAT + 1, "another version"),
    *[(key, None, key) for key in ("runtime", "settings", "inputs", "versions", "files", "status")],
    ("settings", [], "settings"),
]


@pytest.mark.parametrize("rel", RECORDS)
@pytest.mark.parametrize("key, value, names", LACKING)
def test_records_of_another_form(study_copy, cxr_synth_command, rel, key, value, names):
    record = read_json(study_copy / rel)
    record[key] = value
    if value is None:
        del record[key]
    write_json(study_copy / rel, record)
    for words in (["status", study_copy.root], ["run", study_copy.root]):
        said = cxr_synth_command(*words)
        assert said.status == 2 and said.err.count("\n") <= 6
        assert names in said.err and rel.rpartition("/")[2] in said.err


@pytest.mark.parametrize("rel", RECORDS)
@pytest.mark.parametrize("text", ["[]", '"text"', "null", "3", "{}", "{"])
def test_records_that_are_none(study_copy, cxr_synth_command, rel, text):
    (study_copy / rel).write_text(text)
    said = cxr_synth_command("status", study_copy.root)
    assert said.status == 2 and rel.rpartition("/")[2] in said.err


def test_a_setting_that_the_record_lacks(study_copy, cxr_synth_command):
    record = read_json(study_copy / "quality/stage.json")
    del record["settings"]["halvings"]
    record["versions"]["cxr_synth"] = "0.0.0"
    write_json(study_copy / "quality/stage.json", record)
    said = cxr_synth_command("run", study_copy.root)
    assert said.status == 2 and "version 0.0.0" in said.err and "halvings" in said.err


def test_a_study_below_a_folder_named_redo(study_copy, tmp_path):
    "What --redo moved aside is left out by its name in the study, not by that of a folder above it."
    moved = Study(shutil.move(study_copy.root, tmp_path / "x.redo1"))
    assert len(moved.records()) == len(RECORDS) + 2


def test_every_stage_is_covered():
    "A new stage must come with its own cases."
    refusing = {stage for _, stage, _ in ALTERED}
    assert refusing | {"guide", "tune"} == set(STAGES)  # tests/test_tune.py
