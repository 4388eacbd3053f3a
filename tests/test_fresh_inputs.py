"Input by somebody new to it: studies by a wrong name or of a wrong kind, closed streams, links to nothing."

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cxr_synth
from cxr_synth.base.files import CxrError
from cxr_synth.base.locks import hold
from cxr_synth.base.messages import system_error_text
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study, as_study
from cxr_synth.base.settings import CONFIGS
from cxr_synth.ship.pack import naming_disk_errors

STAGES = {  # what each stage is called with behind the study
    "stage_data": ("data",),
    "stage_plan": ("plan",),
    "stage_train": ("train",),
    "stage_generate": ("generate",),
    "stage_quality": ("quality",),
    "stage_experiments": ("experiments",),
    "stage_report": ("report",),
    "stage_guide": ("guide",),
    "open_test": (),
}


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


@pytest.mark.parametrize("study", [None, 7, 1.5, b"s", ["s"], {"s": 1}, True])
@pytest.mark.parametrize("call", [cxr_synth.Study, cxr_synth.run, as_study])
def test_no_study(tmp_path, monkeypatch, call, study):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CxrError, match="my-study"):
        call(study)
    assert not files(tmp_path)


@pytest.mark.parametrize("study", [None, 7, ["s"]])
@pytest.mark.parametrize("name", STAGES)
def test_no_study_for_a_stage(tmp_path, monkeypatch, name, study):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CxrError, match="my-study"):
        getattr(cxr_synth, name)(study, *(CONFIGS[stage]() for stage in STAGES[name]))
    assert not files(tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", [n for n in STAGES if n != "stage_data"])
def test_a_folder_is_a_study_for_every_stage(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CxrError, match="nothing-here"):  # and not an error about its kind
        getattr(cxr_synth, name)(
            kind("nothing-here"), *(CONFIGS[stage]() for stage in STAGES[name])
        )
    assert not files(tmp_path)


@pytest.mark.parametrize("stage", ["data", "plan"])
def test_a_folder_is_a_study_for_run_stage(study_copy, stage):
    cxr_synth.run_stage(str(study_copy.root), stage)
    cxr_synth.run_stage(study_copy.root, stage)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(data=None), "data"),
        (dict(data=["patients"]), "data"),
        (dict(plan="lesson"), "plan"),
        (dict(plan={1: 2}), "plan"),
        (dict(train=CONFIGS["train"]()), "train"),
        (dict(redo="no"), "redo"),
        (dict(redo=0), "redo"),
        (dict(redo=None), "redo"),
        (dict(before="print"), "before"),
        (dict(before=7), "before"),
    ],
)
def test_arguments_of_run(tmp_path, arguments, word):
    with pytest.raises(CxrError, match=f"^{word} "):
        cxr_synth.run(tmp_path / "s", **arguments)
    assert not files(tmp_path)


@pytest.mark.parametrize("command", ["data", "status", "run", "pack"])
@pytest.mark.parametrize("name", ["~/s", "~/a/b", "a\udcff", "\udc80/s"])
def test_names_that_a_shell_did_not_read(tmp_path, monkeypatch, cxr_synth_command, command, name):
    monkeypatch.chdir(tmp_path)
    done = cxr_synth_command(command, name)
    assert done.status == 2 and "can be no folder" in done.err
    assert ("home folder" if "~" in name else "UTF-8") in done.err
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["~", "~s", "a~", "s/~"])
def test_a_tilde_elsewhere_is_a_name(name):
    assert Study(name).root == Path(name)


def test_a_command_of_any_bytes_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cxr-synth", "data", "s", "--data", "a\udcff"])
    with hold(tmp_path, "data"):
        note = read_json(tmp_path / "cache/locks/data.json")
    assert note["command"] == "cxr-synth data s --data a\\udcff"


@pytest.mark.parametrize("words", [["s"], ["s", "t", "u"], []])
@pytest.mark.parametrize("command, form", [("unpack", "FILE STUDY"), ("push", "STUDY GENERATOR")])
def test_words_that_are_missing(cxr_synth_command, command, form, words):
    if command == "push" and len(words) == 3:
        words = [*words, "v"]
    done = cxr_synth_command(command, *words)
    assert done.status == 2 and form in done.err and len(done.err.splitlines()) < 4


@pytest.mark.parametrize("again", ["s", "s/", "./s", "link"])
def test_a_study_is_not_compared_with_itself(study_copy, cxr_synth_command, monkeypatch, again):
    monkeypatch.chdir(study_copy.root.parent)
    os.symlink("s", "link")
    before = files(study_copy.root)
    done = cxr_synth_command("report", "s", again)
    assert done.status == 2 and "given twice" in done.err
    assert files(study_copy.root) == before


@pytest.mark.parametrize("below", ["", "/s"])
def test_a_link_to_nothing_in_the_way(tmp_path, cxr_synth_command, below):
    os.symlink("nowhere", tmp_path / "link")
    done = cxr_synth_command("data", f"{tmp_path}/link{below}", "--data.patients", 60)
    assert done.status == 2 and not (tmp_path / "nowhere").exists()
    assert f"{tmp_path / 'link'} is a link to nothing" in done.err and "move it away" in done.err


def test_a_file_in_the_way_of_unpack(tmp_path):
    (tmp_path / "file").touch()
    error = NotADirectoryError(errno.ENOTDIR, "Not a directory", str(tmp_path / "file/s"))
    with pytest.raises(CxrError, match="is a file") as e, naming_disk_errors(tmp_path / "file/s"):
        raise error
    assert str(e.value) == system_error_text(error)


_MAIN = [sys.executable, "-c", "import sys; from cxr_synth.app import main; sys.exit(main())"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(finished_study, closed):
    line = f'"$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *_MAIN, "status", finished_study], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr


def test_the_working_folder_was_removed(tmp_path, monkeypatch, cxr_synth_command):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = cxr_synth_command("data", "s")
    assert done.status == 2 and "was removed" in done.err and "cd" in done.err
