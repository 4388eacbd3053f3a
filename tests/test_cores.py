"""Threads: made-up trees of cgroups of both versions, made-up cores, damaged files, and a stage's record."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cxr_synth.base import cores
from cxr_synth.base.cores import cpu_quota, physical_cores, pick_threads, usable_cores


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def no_choice(monkeypatch):
    "No variable of the environment says how many threads there should be; 64 are set in torch."
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)


def version_2(root, quota="100000 100000"):
    write(root / "tree/service/cpu.max", quota)
    write(root / "own", "0::/service\n")
    return root / "tree", root / "own"


def version_1(root, quota="100000", mounted="cpu,cpuacct"):
    write(root / f"tree/{mounted}/docker/a/cpu.cfs_quota_us", quota)
    write(root / f"tree/{mounted}/docker/a/cpu.cfs_period_us", "100000")
    write(root / "own", "11:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/init\n")
    return root / "tree", root / "own"


@pytest.mark.parametrize("version", [version_1, version_2])
def test_a_quota_of_one_core_gives_one_thread(tmp_path, no_choice, version):
    where = version(tmp_path)
    assert cpu_quota(*where) == 1.0
    assert pick_threads(usable_cores(*where, cores=64)) == 1


@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
def test_either_name_of_a_version_1_mount(tmp_path, mounted):
    assert cpu_quota(*version_1(tmp_path, "350000", mounted)) == 3.5


def test_inside_a_container_the_quota_stands_at_the_top(tmp_path):
    "There the paths of /proc/self/cgroup are those outside, or just a slash."
    write(tmp_path / "cpu.max", "50000 100000")
    write(tmp_path / "own", "0::/\n")
    assert cpu_quota(tmp_path, tmp_path / "own") == 0.5
    assert usable_cores(tmp_path, tmp_path / "own", cores=64) == 1
    write(tmp_path / "v1/cpu/cpu.cfs_quota_us", "200000")
    write(tmp_path / "v1/cpu/cpu.cfs_period_us", "100000")
    write(tmp_path / "outside", "4:cpu:/kubepods/elsewhere\n")
    assert cpu_quota(tmp_path / "v1", tmp_path / "outside") == 2.0


@pytest.mark.parametrize("text", ["max 100000", "", "-1 100000", "many few", "1", "1 2 3"])
def test_no_quota_and_damaged_files(tmp_path, text):
    where = version_2(tmp_path, text)
    assert cpu_quota(*where) is None and usable_cores(*where, cores=64) == 64
    assert cpu_quota(*version_1(tmp_path / "other", "-1")) is None


def test_damaged_list_of_groups(tmp_path):
    write(tmp_path / "own", "nonsense\n::\n\n4:cpu\n")
    assert cpu_quota(tmp_path, tmp_path / "own") is None


def test_two_threads_of_a_core_count_once(tmp_path, monkeypatch):
    for n in range(8):
        siblings = f"{n % 4},{n % 4 + 4}\n"
        write(tmp_path / f"cpu{n}/topology/thread_siblings_list", siblings)
    monkeypatch.setattr(cores, "_allowed_processors", lambda: list(range(8)))
    assert physical_cores(tmp_path) == 4
    monkeypatch.setattr(cores, "_allowed_processors", lambda: [1, 5, 2])  # as taskset leaves them
    assert physical_cores(tmp_path) == 2
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: None)
    assert physical_cores(tmp_path / "elsewhere") == 3


def test_who_chooses_is_obeyed(monkeypatch, no_choice):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert pick_threads(cores=2) == 64
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert pick_threads(cores=2) == 2 and pick_threads(cores=100) == 64


def test_a_stage_records_them_and_goes_on_with_them(tmp_path):
    "In a new process, where another number of threads is set."
    code = (
        "import torch; from cxr_synth.base import cores; from cxr_synth.base.records import Stage, Study\n"
        f"study = Study({str(tmp_path)!r})\n"
        "cores.usable_cores = lambda: 1\n"
        "stage = Stage(study, 'data', record := {})\n"
        "torch.set_num_threads(7); stage.compute_on('cpu')\n"
        "print(record['threads'], torch.get_num_threads())\n"
        "stage.record = dict(threads=3); stage.compute_on('cpu'); print(torch.get_num_threads())"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    here = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=here, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1", "3"]


@pytest.mark.parametrize(
    ("given", "then"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_how_long_threads_spin_is_the_users_choice_first(given, then):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = "import os, cxr_synth; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(then)
