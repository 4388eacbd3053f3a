"""The installed command: help, mistakes, refusals. Each mistake ends with status 2 and at most five
lines, and leaves earlier work alone.
"""

import shutil, subprocess, sys
from pathlib import Path

import pytest
from PIL import Image
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.images.phantom import write_phantoms

COMMAND = Path(sys.executable).with_name("cxr-synth")


def cxr(*args):
    "Run the installed command: status, output, errors."
    done = subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(*args, says):
    "The command ends with status 2 and a short message that holds every text of `says`."
    status, out, err = cxr(*args)
    assert status == 2, out + err
    assert len(err.strip().splitlines()) <= 5 and "Traceback" not in err, err
    for text in says:
        assert str(text) in err, err


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A study whose data stage is done."
    s = Study(tmp_path_factory.mktemp("app") / "study")
    stage_data(s, DataConfig(patients=120, resolution=32))
    return s


def kaggle(folder, classes=("NORMAL", "PNEUMONIA")):
    "A small folder in the Kaggle layout."
    write_phantoms(folder, patients=120, size=128)
    for path in folder.rglob("*"):
        if path.name in {"NORMAL", "PNEUMONIA"} - set(classes):
            shutil.rmtree(path)
    return folder


def test_help_names_every_command():
    status, out, _ = cxr("--help")
    assert status == 0 and all(
        f"  {c}" in out
        for c in (
            "data",
            "plan",
            "train",
            "generate",
            "quality",
            "experiments",
            "open-test",
            "report",
            "run",
            "status",
        )
    )


def test_help_says_what_run_does():
    _, out, _ = cxr("--help")
    line = next(x for x in out.splitlines() if x.split()[:1] == ["run"])
    stages = "data, plan, train, generate, quality, experiments, open-test, report"
    assert line.split(maxsplit=1)[1] == f"{stages}, in this order"


def test_help_of_a_stage_explains_its_settings():
    status, out, _ = cxr("train", "--help")
    assert status == 0 and "--train.learning-rate" in out and "DreamBooth" in out


def test_unknown_command():
    refused("improve", "S", says=["improve", "Allowed: data"])


def test_unknown_preset(tmp_path):
    refused("run", tmp_path / "s", "--preset", "huge", says=["huge", "Allowed: tiny"])


def test_missing_folder(tmp_path):
    refused(
        "run",
        tmp_path / "s",
        "--data",
        tmp_path / "none",
        says=[tmp_path / "none", "does not exist"],
    )


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        "run", tmp_path / "s", "--data", tmp_path / "empty", says=[tmp_path / "empty", "NORMAL"]
    )


def test_folder_without_class_folders(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "set/some.png")
    refused("run", tmp_path / "s", "--data", tmp_path / "set", says=[tmp_path / "set", "NORMAL"])


def test_study_within_its_own_source(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "set/some.png")
    refused("run", tmp_path / "set/s", "--data", tmp_path / "set", says=["one lies in the other"])
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["some.png"]


def test_one_class_only(tmp_path):
    refused(
        "run", tmp_path / "s", "--data", kaggle(tmp_path / "half", ["NORMAL"]), says=["PNEUMONIA"]
    )


def test_unreadable_image(tmp_path):
    folder = kaggle(tmp_path / "set")
    bad = sorted((folder / "train" / "NORMAL").iterdir())[3]
    bad.write_bytes(b"not an image")
    refused("run", tmp_path / "s", "--data", folder, says=[bad.name])


def test_no_network(tmp_path):
    refused(
        "run",
        tmp_path / "s",
        "--data",
        "hub",
        "--data.hub-id",
        "nobody/no-such-set",
        says=["nobody/no-such-set", "--data FOLDER"],
    )


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    says = ["file", "is a file, and a folder should be there"]
    refused("run", tmp_path / "file" / "s", "--data", "phantom", says=says)


def test_other_settings(study):
    before = {p: p.read_bytes() for p in study.root.rglob("*") if p.is_file()}
    refused(
        "data",
        study.root,
        "--data.patients",
        "130",
        says=["data.patients: recorded 120, now 130", "--redo"],
    )
    refused("run", study.root, "--preset", "a100-80gb", says=["preset: recorded 'tiny'"])
    assert {p: p.read_bytes() for p in study.root.rglob("*") if p.is_file()} == before


def test_stage_out_of_order(study):
    refused("train", study.root, says=["plan.json", "cxr-synth plan"])


def test_folder_that_is_no_study(tmp_path):
    refused("status", tmp_path, says=["is not a study"])


def test_status(study):
    status, out, _ = cxr("status", study.root)
    assert status == 0 and "complete" in out


def test_debug_shows_the_traceback(tmp_path):
    status, _, err = cxr("run", tmp_path / "s", "--data", tmp_path / "none", "--debug")
    assert status != 0 and "Traceback" in err
