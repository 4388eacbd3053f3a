"""Work that fails: the other runs are done, the exit status and one sentence say so; what cannot be used
(black images, numbers that are not finite, damaged caches) never reaches a classifier.
"""

import subprocess
import sys
import textwrap

import pytest

from cxr_synth.base.files import CxrError, PartlyFailed, write_json
from cxr_synth.base.messages import failure_reason
from cxr_synth.base.readers import read_json
from cxr_synth.classify import executors
from cxr_synth.protocol.plan import load_plan
from cxr_synth.stages.run import in_turn


class CannotDo(Exception):
    "An exception of somebody's library."


ERRORS = {  # an exception -> what the reason must say
    "value": (ValueError("Input X contains NaN."), "ValueError: Input X contains NaN."),
    "two lines": (ValueError("no\nInput X contains NaN."), "Input X contains NaN."),
    "no message": (ZeroDivisionError(), "ZeroDivisionError"),
    "key": (KeyError("weights"), "KeyError: 'weights'"),
    "library": (CannotDo("half a tensor"), "CannotDo: half a tensor"),
    "file": (FileNotFoundError(2, "No such file", "gone.png"), "gone.png"),
    "runtime": (RuntimeError("mat1 and mat2 shapes"), "RuntimeError: mat1 and mat2 shapes"),
    "refusal": (CxrError("no images are left.\nAllowed: some."), "no images are left."),
    "accents": (ValueError("größer −1"), "größer −1"),
}


def fail(monkeypatch, error, when):
    "Let the runs for which `when` holds fail."
    real = executors.make_run

    def make_run(run, context):
        if when(run):
            raise error
        return real(run, context)

    monkeypatch.setattr(executors, "make_run", make_run)


def again(study):
    "Take the runs out, so that they are to be done."
    write_json(
        study / "runs/stage.json", read_json(study / "runs/stage.json") | dict(status="running")
    )
    for path in study.root.glob("runs/*/*/run.json"):
        path.unlink()


def checked(said, *texts):
    "A short sentence, no traceback, and each of the texts."
    assert said.count("\n") <= 6 and "Traceback" not in said, said
    assert 'File "' not in said and ".py" not in said, said
    for text in texts:
        assert text in said, said


@pytest.mark.parametrize("kind", ERRORS)
def test_all_runs_fail(study_copy, cxr_synth_command, monkeypatch, kind):
    error, reason = ERRORS[kind]
    again(study_copy)
    fail(monkeypatch, error, lambda run: True)
    n = len(load_plan(study_copy).runs())
    for _ in range(2):  # the second time nothing is left to do, and it is said again
        done = cxr_synth_command("experiments", study_copy.root)
        assert done.status == 3
        checked(done.err, f"{n} of {n} runs failed", reason, "--experiments.retry-failed")
    if kind == "value":  # nothing follows from nothing
        done = cxr_synth_command("run", study_copy.root)
        assert done.status == 3 and "report:" not in done.out


@pytest.mark.parametrize("arms", [("mixed",), ("real", "duplicate"), ("synthetic_only",)])
def test_some_runs_fail(study_copy, cxr_synth_command, monkeypatch, arms):
    again(study_copy)
    runs = load_plan(study_copy).runs()
    with monkeypatch.context() as m:
        fail(m, ValueError("Input X contains NaN."), lambda run: run.arm in arms)
        done = cxr_synth_command("experiments", study_copy.root)
    n = sum(run.arm in arms for run in runs)
    checked(done.err, f"{n} of {len(runs)} runs failed", "ValueError: Input X contains NaN.")
    assert done.status == 3 and len(list(study_copy.root.glob("runs/*/*/run.json"))) == len(runs)
    done = cxr_synth_command("experiments", study_copy.root, "--experiments.retry-failed")
    assert done.status == 0 and done.err == ""


def test_two_reasons_are_both_told(study_copy, cxr_synth_command, monkeypatch):
    again(study_copy)
    fail(monkeypatch, ValueError("one"), lambda run: run.arm == "real")
    fail(monkeypatch, KeyError("two"), lambda run: run.arm == "mixed")
    done = cxr_synth_command("experiments", study_copy.root)
    checked(done.err, "ValueError: one", "KeyError: 'two'")


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EMFILE", "EIO"])
def test_a_full_disk_is_no_fault_of_a_run(study_copy, cxr_synth_command, monkeypatch, number):
    import errno

    again(study_copy)
    error = OSError(getattr(errno, number), "refused", str(study_copy / "runs/x.csv"))
    fail(monkeypatch, error, lambda run: True)
    done = cxr_synth_command("experiments", study_copy.root)
    assert done.status == 2 and "x.csv" in done.err
    assert not list(study_copy.root.glob("runs/*/*/run.json"))  # none is marked as failed


def test_out_of_memory_is_told(study_copy, cxr_synth_command, monkeypatch):
    again(study_copy)
    fail(monkeypatch, MemoryError("8 GiB"), lambda run: True)
    done = cxr_synth_command("experiments", study_copy.root)
    assert done.status == 2
    checked(done.err, "out of memory", "goes on" if "goes on" in done.err else "Repeat")


@pytest.mark.parametrize("nothing_done", [True, False])
def test_what_follows_a_stage_that_partly_failed(nothing_done):
    seen = []

    def do(stage):
        seen.append(stage)
        if stage == "b":
            raise PartlyFailed("1 of 2", nothing_done)

    if nothing_done:
        with pytest.raises(PartlyFailed):
            in_turn("abc", do)
    else:
        assert in_turn("abc", do).exit_status == 3
    assert seen == (["a", "b"] if nothing_done else ["a", "b", "c"])


def test_records_of_older_versions_have_a_reason():
    old = 'File "a.py", line 3, in f\n    g()\nValueError: Input X contains NaN.\n'
    assert failure_reason(dict(error=old)) == "ValueError: Input X contains NaN."
    assert failure_reason({}) == "its record does not say why"


# ---- scripts without a main guard

SCRIPT = """
from cxr_synth.base.records import Study
from cxr_synth.base.settings import ExperimentsConfig
from cxr_synth.stages.classify import stage_experiments
from cxr_synth.classify.executors import open_executor

def work():
    with open_executor({executor!r}, 2) as pool:
        print(pool and pool.submit(abs, -3).result())

"""
CALLS = {  # how the script calls -> whether that can work
    "work()": False,
    "for k in range(1):\n    work()": False,
    "if True:\n    work()": False,
    "def main():\n    work()\n\nmain()": False,
    "if __name__ == '__main__':\n    work()": True,
    "def main():\n    work()\n\nif __name__ == '__main__':\n    main()": True,
    "import multiprocessing\nif multiprocessing.parent_process() is None:\n    work()": False,
}


@pytest.mark.parametrize("call", CALLS)
def test_script_without_main_guard(tmp_path, call):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(executor="processes") + textwrap.dedent(call))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    if CALLS[call]:
        assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
    else:
        assert done.returncode and 'if __name__ == "__main__":' in done.stderr
        assert done.stderr.count("files.CxrError:") == 1  # at once, not from every process


def test_serial_needs_no_guard(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(executor="serial") + "work()")
    assert subprocess.run([sys.executable, path]).returncode == 0
