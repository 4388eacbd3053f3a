"What the notebook of the phantoms cannot show: worker processes of a plain script, and a killed one."

import os, subprocess, sys, time
from cxr_synth.images.phantom import phantom_files, write_phantoms

SCRIPT = (
    "from cxr_synth.images.phantom import write_phantoms; write_phantoms({folder!r}, "
    "patients={patients}, size=64, workers=2, shift=.5, shortcut=.5)"
)


def start(folder, patients):
    "A script without the usual guard for processes."
    code = SCRIPT.format(folder=str(folder), patients=patients)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | dict(CXR_QUIET="1"))


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_workers_draw_what_one_process_draws(tmp_path):
    assert start(tmp_path / "two", 40).wait(120) == 0
    write_phantoms(tmp_path / "one", patients=40, size=64, workers=1, shift=0.5, shortcut=0.5)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_killed_and_repeated(tmp_path):
    job = start(tmp_path / "set", 2000)
    pattern = ".set~?????~"
    while job.poll() is None and len(list(tmp_path.glob(f"{pattern}/**/*.jpeg"))) < 50:
        time.sleep(0.05)
    job.kill()
    job.wait(30)
    assert list(tmp_path.glob(pattern)) and not (tmp_path / "set").exists()
    write_phantoms(tmp_path / "set", patients=30, size=64)
    assert len(list((tmp_path / "set").rglob("*.png"))) == len(phantom_files(30))
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["test", "train", "truth.csv"]
