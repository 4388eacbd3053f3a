"The proof on a GPU at its small scale: every step of it, its files, and that a failure is seen."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    "build the base",
    "train, all weights",
    "train, LoRA",
    "resume",
    "half precision, LoRA",
    "half precision, all weights",
    "NaN, training",
    "NaN, drawing",
]


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    "The finished command, and the folder that it wrote."
    out = tmp_path_factory.mktemp("proof") / "out"
    words = [sys.executable, ROOT / "benchmarks/gpu.py", "--scale", "small", "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*words, "--out", out], capture_output=True, text=True, env=env)
    assert (out / "gpu.json").is_file(), done.stderr[-2000:]
    return done, out


@pytest.fixture
def gpu(monkeypatch):
    "The script as a module."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_every_step_passes_at_the_small_scale(proof):
    done, out = proof
    result = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    rows = {row["step"]: row for row in result["rows"]}
    assert {s: r["error"] for s, r in rows.items() if r["state"] != "ok"} == {}
    assert done.returncode == 0 and result["passed"] and result["scale"] == "small"
    assert [*rows][:8] == STEPS and [*rows][-1] == "both classes in 40 GB"
    assert sum(step.startswith("draw, ") for step in rows) == 6


def test_the_rows_hold_numbers(proof):
    result = json.loads((proof[1] / "gpu.json").read_text(encoding="utf-8"))
    found = {row["step"]: row["found"] for row in result["rows"]}
    for step in STEPS[1:3]:
        row = found[step]
        assert row["ratio"] == pytest.approx(row["images_per_s"] / row["bare_images_per_s"], 0.01)
        assert row["estimate_gib"] > 1 and row["loss"] > 0
    assert found["resume"]["killed_at"] == 5 and found["resume"]["resumed_at"] == 3
    assert found["resume"]["loss_difference"] < 1e-6 > found["resume"]["update_difference"]
    assert "diverged" in found["NaN, training"]["error"]
    assert found["NaN, drawing"]["images"] == 0
    assert found["half precision, LoRA"]["previews"] == ["000000.png", "000003.png"]
    assert sum(row["seconds"] for row in result["rows"]) <= result["seconds"]
    assert {"torch", "diffusers"} <= set(result["machine"]["versions"])


def test_the_table_has_a_line_for_each_row(proof):
    result = json.loads((proof[1] / "gpu.json").read_text(encoding="utf-8"))
    lines = (proof[1] / "gpu.md").read_text(encoding="utf-8").splitlines()
    shown = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")][1:]
    assert shown == [row["step"] for row in result["rows"]]
    assert "all steps passed" in lines[0]


def test_a_failed_step_is_a_row_and_the_next_one_is_done(gpu, tmp_path):
    p = gpu.Proof("small", "cpu", 0, 9, tmp_path)
    p.step("a", 0, lambda p, found: found.update(x=1) or 1 / 0)
    p.step("b", 0, lambda p, found: found.update(y=2))
    p.step("c", 0, lambda p, found: gpu.demand(False, "black | images"))
    assert [r["state"] for r in p.rows] == ["failed", "ok", "failed"]
    assert p.rows[0]["error"].startswith("ZeroDivisionError") and p.rows[0]["found"] == {"x": 1}
    result = dict(rows=p.rows, machine=gpu.machine(p), scale="small", seconds=1.0, passed=False)
    text = gpu.table(result)
    assert "NOT all steps passed" in text and "Unproven: black \\| images" in text


def test_no_step_is_begun_when_the_time_is_up(gpu, tmp_path):
    p = gpu.Proof("small", "cpu", 0, 0.5, tmp_path)
    p.full = True
    p.step("long", 60, lambda p, found: found.update(x=1))
    assert p.rows[0]["state"] == "not begun" and "60 s" in p.rows[0]["error"]


def test_a_run_that_goes_on_with_a_fresh_optimizer_is_caught(gpu, tmp_path, monkeypatch):
    "The losses alone would not tell: so few steps hardly move a network."
    from cxr_synth.base.loop import OptimizerStep

    whole = OptimizerStep.load

    def forgetful(self, state):
        empty = self.adam.state_dict()
        whole(self, state | dict(opt=empty))

    monkeypatch.setattr(OptimizerStep, "load", forgetful)
    p = gpu.Proof("small", "cpu", 0, 9, tmp_path)
    p.step("build", 0, gpu.build)
    p.step("resume", 0, gpu.resume)
    assert p.rows[1]["state"] == "failed" and "not those of the calm run" in p.rows[1]["error"]
