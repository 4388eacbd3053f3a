"Two at once: the second one is told who is at work, since when; runs and images are shared all the same."

import errno
import os
import subprocess
import sys
import threading
import zipfile

import pytest

from cxr_synth.base import locks
from cxr_synth.base.files import write_json
from cxr_synth.base.locks import InUse, alone, hold, share, together
from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.base.records import Study
from cxr_synth.stages.data import stage_data
from cxr_synth.base.settings import DataConfig

HELD = {  # what is held -> a command that wants it
    "data": ["data"],
    "plan": ["plan"],
    "train real010-rep0": ["train"],
    "train real010-rep1": ["train"],
    "quality": ["quality"],
    "open-test": ["open-test"],
    "report": ["report"],
    "experiments": ["experiments", "--experiments.views", "3", "--redo"],
}


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("what", HELD)
def test_second_one_is_told(study_copy, cxr_synth_command, what):
    command, *more = HELD[what]
    holder = share(study_copy.root, what) if what == "experiments" else hold(study_copy.root, what)
    with holder:
        done = cxr_synth_command(command, study_copy.root, *more)
    assert done.status == 2 and done.err.count("\n") <= 4, done.err
    for text in ("at work already", f"process {os.getpid()} on", "since 20", str(study_copy.root)):
        assert text in done.err
    if command not in ("train", "experiments"):
        assert cxr_synth_command(command, study_copy.root).status == 0


HOLDER = """
import sys, time
from cxr_synth.base.locks import hold, share
holder = share if sys.argv[2] == "experiments" else hold
with holder(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("what", ["data", "train real010-rep0", "experiments"])
def test_a_killed_holder_is_forgotten(tmp_path, what):
    write_json(tmp_path / "study.json", {})
    p = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path, what], stdout=subprocess.PIPE)
    try:
        assert p.stdout.readline() == b"held\n"
        wanted = share(tmp_path, what, True) if what == "experiments" else hold(tmp_path, what)
        with pytest.raises(InUse, match=f"process {p.pid} on "), wanted:
            pass
    finally:
        p.kill()
        p.wait()
    with share(tmp_path, what, True) if what == "experiments" else hold(tmp_path, what):
        pass


def test_others_may_train_other_generators(tmp_path):
    with hold(tmp_path, "train real010-rep0"), hold(tmp_path, "train real010-rep1"):
        pass


def test_two_processes_share_a_grid(study_copy):
    def results():
        rows = read_csv(study_copy / "results.csv")
        return [{k: v for k, v in row.items() if not k.startswith("test_")} for row in rows]

    before = results()
    stage = study_copy / "runs/stage.json"
    write_json(stage, read_json(stage) | dict(status="running"))
    for path in study_copy.root.glob("runs/*/*/run.json"):
        path.unlink()
    code = "import sys; from cxr_synth.app import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "experiments", str(study_copy.root)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert results() == before
    assert read_json(stage)["status"] == "complete"


def test_a_run_that_another_one_does_is_waited_for(tmp_path):
    write_json(tmp_path / "study.json", {})
    seen = []

    def second():
        with hold(tmp_path, "run", wait=True, keep=False):
            seen.append("second")

    with hold(tmp_path, "run", keep=False):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        seen.append("first")
    thread.join(30)
    assert seen == ["first", "second"]


@pytest.mark.parametrize("source", ["nowhere", "."])
def test_a_refusal_leaves_nothing(tmp_path, cxr_synth_command, source):
    (tmp_path / "films").mkdir()
    before = everything(tmp_path)
    for study in (tmp_path / "new/s", tmp_path):
        assert cxr_synth_command("data", study, "--data", tmp_path / source).status == 2
        assert everything(tmp_path) == before


def test_locks_count_nowhere(study_copy, cxr_synth_command, tmp_path):
    digests = {rel: study_copy.digest(rel) for rel in ("data", "synthetic", "models", "runs")}
    with hold(study_copy.root, "quality"), share(study_copy.root, "experiments"):
        assert digests == {rel: study_copy.digest(rel) for rel in digests}
        assert cxr_synth_command("status", study_copy.root).status == 0
        assert cxr_synth_command("pack", study_copy.root, "--out", tmp_path / "s.zip").status == 0
    with zipfile.ZipFile(tmp_path / "s.zip") as z:
        assert not [name for name in z.namelist() if "lock" in name]


REFUSED = {
    "ENOSYS": 1,
    "ENOLCK": 1,
    "EOPNOTSUPP": 1,
    "not implemented": 1,
    "EROFS": 0,
    "EACCES": 0,
    "ENOSPC": 0,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_disk_without_locks(tmp_path, monkeypatch, capsys, reason):
    error = NotImplementedError()
    if reason.startswith("E"):
        error = OSError(getattr(errno, reason), "refused")

    def acquire(self, *args, **kw):
        raise error

    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    with hold(tmp_path / "s", "data"):
        pass
    said = capsys.readouterr().out
    assert said.count("\n") == REFUSED[reason] and ("no locks" in said) == bool(said)


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b"\xff\xfe", None])
def test_a_damaged_note_still_refuses(tmp_path, note):
    write_json(tmp_path / "study.json", {})
    with hold(tmp_path, "data"):
        path = tmp_path / "cache/locks/data.json"
        path.unlink() if note is None else path.write_bytes(note)
        with (
            pytest.raises(InUse, match="at work already, by another process"),
            hold(tmp_path, "data"),
        ):
            pass


def test_errors_pass_and_free_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold(tmp_path, "data"):
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), share(tmp_path, "experiments", True):
            raise KeyboardInterrupt


def test_decorators_keep_name_and_arguments(tmp_path):
    study = Study(tmp_path)

    @alone("train {name}")
    def train(study, name, redo=False):
        "Train."
        with pytest.raises(InUse), hold(study.root, f"train {name}"):
            pass
        return name

    @together("grid")
    def grid(study, redo=False):
        return redo

    assert train(study, "a") == train(study, name="a") == "a" and train.__doc__ == "Train."
    assert grid(study, redo=True) and not grid(study)
    assert stage_data.__name__ == "stage_data" and stage_data.__wrapped__


def test_second_call_in_python(tmp_path):
    study = Study(tmp_path / "s")
    with hold(study.root, "data"), pytest.raises(InUse, match="data is at work already"):
        stage_data(study, DataConfig(patients=60, resolution=32))
