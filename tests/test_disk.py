"""What the system refuses: a full disk, a file in the way, a name too long, no rights. Each is told with its
path and a sentence of its own; what was there stays, and nothing half-written is left.
"""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cxr_synth.base import files
from cxr_synth.base.files import atomic_folder, atomic_path, final_name, temporary_for
from cxr_synth.base.files import is_left_behind, remove_leftovers, write_csv, write_json, write_text
from cxr_synth.base.checkpoints import Checkpoint
from cxr_synth.base.messages import system_error_text

LARGE = torch.zeros(500_000)  # 2 MB
WRITERS = {
    "torch": lambda p: torch.save(dict(a=LARGE), p),
    "torch, open file": lambda p: _into(p, lambda f: torch.save(dict(a=LARGE), f)),
    "safetensors": lambda p: save_file(dict(a=LARGE), p),
    "numpy": lambda p: _into(p, lambda f: np.save(f, LARGE.numpy())),
    "png": lambda p: Image.fromarray(_noise()).save(p, format="PNG"),
    "text": lambda p: p.write_text("x" * 2_000_000),
    "copy": lambda p: shutil.copyfile(psutil.__file__, p) and p.write_bytes(bytes(2_000_000)),
}


def _noise():
    return np.random.default_rng(0).integers(0, 256, (1500, 1500), np.uint8)


def _into(path, write):
    with open(path, "wb") as f:
        write(f)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 300 KB."
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], stderr=subprocess.DEVNULL
    ):
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.call(["umount", "-l", folder])


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_names_the_file(small_disk, kind):
    path = small_disk / kind / "model.bin"
    write_text(path, "the old one")
    with pytest.raises(OSError) as told, atomic_path(path) as tmp:
        WRITERS[kind](tmp)
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "the old one" and len(list(path.parent.iterdir())) == 1
    text = system_error_text(told.value)
    assert text.startswith(f"the disk is full: {path}") and "Make room" in text


@pytest.mark.parametrize("kind", ["torch", "safetensors", "png", "text"])
def test_full_disk_leaves_no_half_folder(small_disk, kind):
    folder = small_disk / f"folder {kind}"
    with pytest.raises(OSError) as told, atomic_folder(folder) as tmp:
        write_text(tmp / "config.json", "{}")
        WRITERS[kind](tmp / "weights")
    assert told.value.errno == errno.ENOSPC and str(folder) in told.value.filename
    assert "~" not in told.value.filename
    assert not [p for p in small_disk.iterdir() if folder.name in p.name]


def test_full_disk_at_a_checkpoint(small_disk):
    path = small_disk / "run/normal.pt"
    Checkpoint(path).save(dict(step=1))
    before = path.read_bytes()
    with pytest.raises(files.CxrError, match="cannot write the checkpoint") as told:
        Checkpoint(path).save(dict(step=2, a=LARGE))
    assert str(path) in str(told.value) and "No space left" in str(told.value)
    assert path.read_bytes() == before


def test_full_disk_of_the_data_stage(small_disk, cxr_synth_command):
    study = small_disk / "study"
    done = cxr_synth_command("data", study, "--data", "phantom", "--data.patients", "2000")
    assert done.status == 2 and "Traceback" not in done.err and done.err.count("\n") <= 5
    assert "the disk is full" in done.err and str(study) in done.err
    assert not [p for p in small_disk.rglob("*") if p.name.endswith("~")]


SENTENCES = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "the disk is full",
    "ENOTDIR": "is a file, and a folder should be there",
    "EEXIST": "is a file, and a folder should be there",
    "EISDIR": "is a folder, and a file should be written there",
    "ENAMETOOLONG": "is too long",
    "EACCES": "may not be read or written",
    "EPERM": "may not be read or written",
    "EROFS": "read-only",
    "ENOENT": "is not there",
    "EMFILE": "too many files",
    "ENFILE": "too many files",
    "EIO": "the disk cannot read or write",
    "ENOMEM": "out of memory",
    "EXDEV": os.strerror(errno.EXDEV),
}


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("known", [True, False], ids=["with a path", "without"])
def test_every_refusal_has_its_sentence(tmp_path, name, known, monkeypatch, cxr_synth_command):
    path = tmp_path / "study/plan.json"
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), *([str(temporary_for(path))] if known else []))

    def command(argv):
        raise error

    monkeypatch.setattr("cxr_synth.app.command", command)
    done = cxr_synth_command("plan", tmp_path / "study")
    assert done.status == 2 and SENTENCES[name] in done.err and done.err.count("\n") <= 3
    assert str(path if known else tmp_path / "study") in done.err and "~" not in done.err
    others = {s for n, s in SENTENCES.items() if s != SENTENCES[name]}
    assert not [s for s in others if s in done.err]


WAYS = {  # where a file stands -> commands that want a folder there
    "data": ["data"],
    "synthetic": ["generate"],
    "quality": ["quality"],
    "runs": ["experiments"],
    "report": ["report"],
}


@pytest.mark.parametrize("folder", WAYS)
def test_a_file_where_a_folder_should_be(study_copy, cxr_synth_command, folder):
    for way in (study_copy / folder, study_copy / "results.csv"):
        shutil.rmtree(way) if way.is_dir() else way.unlink(missing_ok=True)
    (study_copy / folder).write_text("mine")
    done = cxr_synth_command(WAYS[folder][0], study_copy.root, *WAYS[folder][1:])
    assert done.status == 2 and "Traceback" not in done.err and "space left" not in done.err
    assert str(study_copy / folder) in done.err and done.err.count("\n") <= 5
    assert (study_copy / folder).read_text() == "mine"


@pytest.mark.parametrize("below", ["s", "a/b/s"])
def test_a_study_below_a_file(tmp_path, cxr_synth_command, below):
    (tmp_path / "file").write_text("mine")
    done = cxr_synth_command("data", tmp_path / "file" / below, "--data", "phantom")
    assert done.status == 2 and f"{tmp_path / 'file'} is a file" in done.err


# ---- names


@pytest.mark.parametrize("name", ["a", "x" * 100, "снимок-" * 8, "plan.json", ".hidden"])
def test_temporary_names_are_little_longer(name):
    path = temporary_for(name)
    assert len(os.fsencode(path.name)) - len(os.fsencode(name)) <= 8
    assert str(final_name(f"a/{path}/b")) == f"a/{name}/b" and is_left_behind(path)


@pytest.mark.parametrize("letter", ["x", "ж"])
@pytest.mark.parametrize(
    "n, fits", [(200, True), (246, True), (250, False), (256, False), (400, False)]
)
def test_long_names(tmp_path, letter, n, fits):
    path = tmp_path / (letter * (n // len(letter.encode())))
    if fits:
        write_text(path, "x")
        return
    with pytest.raises(OSError) as told:
        write_text(path, "x")
    text = system_error_text(told.value)
    assert "is too long" in text and "247 are allowed" in text and str(path) in text


@pytest.mark.parametrize("n", [256, 300, 4000])
@pytest.mark.parametrize("command", ["data", "status", "run"])
def test_long_study_names(tmp_path, cxr_synth_command, command, n):
    done = cxr_synth_command(command, tmp_path / ("s" * n))
    assert done.status == 2 and "Traceback" not in done.err and "space" not in done.err
    assert "200 bytes" in done.err or "too long" in done.err


def test_threads_and_processes_have_names_of_their_own(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    meet = Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda k: meet.wait() is None or temporary_for("a"), range(8)))
    assert len({*names, temporary_for("a")}) == 9


@pytest.mark.parametrize("form", [".a.npy~{}~", ".a.npy.{}-77.tmp", ".a.npy.{}.tmp"])
@pytest.mark.parametrize("alive", [True, False])
def test_leftovers_of_both_forms(tmp_path, form, alive, monkeypatch):
    pid = psutil.Process().ppid() if alive else 4_194_303
    if "~" in form:
        monkeypatch.setattr(files.os, "getpid", lambda: pid)
        path = temporary_for(tmp_path / "a.npy")
        monkeypatch.undo()
    else:
        path = tmp_path / form.format(pid)
    path.write_bytes(b"half")
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / ".notes~").write_text("mine")
    (tmp_path / ".notes.~1~").write_text("mine")
    remove_leftovers(tmp_path)
    assert path.exists() == alive and len(list(tmp_path.iterdir())) == 3 + alive


# ---- rights


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_files_have_the_rights_of_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        write_csv(tmp_path / "a.csv", ["a"], [])
        with atomic_path(tmp_path / "a.safetensors") as tmp:
            save_file(dict(a=torch.zeros(2)), tmp)
        with atomic_path(tmp_path / "a.pt") as tmp:
            torch.save(dict(a=1), tmp)
        with atomic_folder(tmp_path / "model") as tmp:
            save_file(dict(a=torch.zeros(2)), tmp / "b.safetensors")
        found = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    finally:
        os.umask(before)
    assert found == dict.fromkeys(found, 0o666 & ~umask) and len(found) == 5


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
def test_models_can_be_read_by_others(finished_study):
    files = [p for p in (finished_study / "models").rglob("*") if p.is_file()]
    umask = os.umask(0)
    os.umask(umask)
    assert files and {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}
