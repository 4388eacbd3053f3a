"A data stage killed while it prepares images goes on where it stopped and ends like an undisturbed one."

import subprocess, sys, time
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.images.phantom import write_phantoms

CODE = """
import sys
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.stages.data import stage_data
stage_data(Study(sys.argv[1]), DataConfig(source=sys.argv[2], workers=1))
"""


def kill_after(n, study, source):
    "Run the stage in a process of its own and kill it once `n` images are there."
    p = subprocess.Popen([sys.executable, "-c", CODE, str(study.root), str(source)])
    while p.poll() is None and len(list((study / "data" / "images").glob("*.png"))) < n:
        time.sleep(0.002)
    p.kill()
    p.wait()


def digests(study):
    return [
        study.digest(rel)
        for rel in ("data/manifest.csv", "data/fractions.csv", "data/audit.json", "data/images")
    ]


def test_killed_stage_continues(tmp_path):
    source = write_phantoms(tmp_path / "phantoms", patients=150, size=128)
    study, calm = Study(tmp_path / "killed"), Study(tmp_path / "calm")
    kill_after(20, study, source)
    there = {p: p.stat().st_mtime_ns for p in (study / "data" / "images").glob("*.png")}
    assert (
        len(there) >= 20
        and not (study / "data" / "manifest.csv").exists()
        and not (study / "study.json").exists()
    )
    for s in (study, calm):
        stage_data(s, DataConfig(source=str(source), workers=2))
    assert not list((study / "data").rglob("*~"))
    assert {p: p.stat().st_mtime_ns for p in there} == there
    assert digests(study) == digests(calm)


def test_killed_then_other_folder(tmp_path):
    first, second = (
        write_phantoms(tmp_path / f"phantoms{k}", patients=130, seed=k, size=128) for k in (0, 1)
    )
    study, calm = Study(tmp_path / "killed"), Study(tmp_path / "calm")
    kill_after(5, study, first)
    for s in (study, calm):
        stage_data(s, DataConfig(source=str(second), workers=2))
    assert digests(study) == digests(calm)
