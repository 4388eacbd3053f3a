"""Set before any test imports torch, and inherited by the processes that tests start: one thread, no
screen, no network, no bars. And one small finished study, made once for all tests that damage a copy.
"""

import os

for name, value in dict(
    OMP_NUM_THREADS="1", MPLBACKEND="Agg", HF_HUB_OFFLINE="1", CXR_QUIET="1"
).items():
    os.environ.setdefault(name, value)

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

SMALL = {  # stage -> settings of a study with trained generators that is made in a minute
    "data": {"patients": 120, "resolution": 32},
    "plan": {"tier": "lesson", "pool": 12, "size": 32},
    "train": {
        "base": "tiny",
        "joint": False,
        "vae_steps": 6,
        "base_steps": 6,
        "base_batch_size": 8,
        "max_train_steps": 4,
        "train_batch_size": 8,
        "preview_steps": None,
        "heldout_images": 8,
    },
    "generate": {"num_inference_steps": 2, "batch_size": 2},
    "quality": {"size": 32, "halvings": 2},
    "experiments": {"size": 32, "views": 2},
    "report": {"draws": 50, "poster": 600},
}


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory):
    "Folder of a finished study, to be read only; made by the first process that wants it."
    from cxr_synth.stages.run import run

    if ready := os.environ.get("CXR_FINISHED_STUDY"):  # one that is there, to save a minute
        return Path(ready)
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "finished-study"
    with FileLock(shared / "finished-study.lock"):
        if not (folder / "report/index.html").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run(folder, **SMALL)
    return folder


@pytest.fixture(autouse=True)
def own_ledgers(request, tmp_path_factory, monkeypatch):
    "No test reads or writes the ledgers of the user, or of another test."
    own = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    monkeypatch.setenv("CXR_LEDGERS", str(tmp_path_factory.getbasetemp() / "ledgers" / own))


@pytest.fixture
def study_copy(finished_study, tmp_path):
    "A copy of the finished study, named `s` in the test's own folder, to damage."
    from cxr_synth.base.records import Study

    return Study(shutil.copytree(finished_study, tmp_path / "s"))


@pytest.fixture
def cxr_synth_command(capsys):
    "The command line in this process: `cxr_synth_command('status', folder)` gives .status, .out and .err."
    from cxr_synth.app import main

    def command(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err)

    return command
