"Processes share a set without a coordinator, and go on after a kill: the bytes are those of one undisturbed."

import json, os, random, subprocess, sys, time
from collections import Counter

import psutil, pytest
from cxr_synth.base.records import Study, move_aside, open_stage
from cxr_synth.base.settings import DataConfig, GenerateConfig, PROMPTS, TrainConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.diffusion.image_writer import ImageSetWriter, image_names
from cxr_synth.protocol.sets import unexpected_files
from cxr_synth.protocol.plan import Plan, PlannedGenerator
from cxr_synth.stages.generate import stage_generate
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from PIL import Image

NAME, N = "real100-rep0", 9
CFG = dict(num_inference_steps=2, batch_size=2, threads=1, mixed_precision="no", device="cpu")
PLAN = Plan(generators=(PlannedGenerator(NAME, images={"normal": N, "pneumonia": N}),))
CODE = """
import json, sys
from cxr_synth.base.records import Study
from cxr_synth.base.settings import GenerateConfig
from cxr_synth.protocol.plan import Plan
from cxr_synth.stages.generate import stage_generate
root, plan, cfg, redo = sys.argv[1:]
plan = Plan.from_json(json.loads(plan))
cfg = GenerateConfig(**json.loads(cfg))
stage_generate(Study(root), cfg, redo == "redo", plan, card=None)
"""


def untrained_study(root):
    "Data, and a generator whose two models are untrained: they draw fog, but always the same fog."
    study = Study(root)
    stage_data(study, DataConfig(patients=120, resolution=32))
    stage = open_stage(study, "train", f"models/{NAME}", TrainConfig())
    for k, cls in enumerate(PROMPTS):
        tiny_pipeline(study / "tokenizer", PROMPTS.values(), 32, seed=k).save_pretrained(
            stage.path / cls
        )
    stage.finish()
    return study


def command(study, cfg=(), redo="", processes=1):
    run = (
        [sys.executable, "-c", CODE]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            "0",
            "--no-python",
            sys.executable,
            "-c",
            CODE,
        ]
    )
    return [*run, str(study.root), json.dumps(PLAN.to_json()), json.dumps(CFG | dict(cfg)), redo]


def bytes_of(study):
    "Every file of the set but its record, which has a date."
    folder = study / "synthetic" / NAME
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "stage.json"
    }


def kill_after(study, more, processes):
    "Start, and kill all processes without warning as soon as so many more images are there."

    def there():
        return len(unexpected_files(study / "synthetic" / NAME, []))

    wanted = there() + more
    p = subprocess.Popen(
        command(study, processes=processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while p.poll() is None and there() < wanted:
        time.sleep(0.002)
    for q in [*psutil.Process(p.pid).children(recursive=True), p]:
        q.kill()  # torchrun's processes are in sessions of their own
    p.wait()
    assert not (study / "synthetic" / NAME / "metadata.jsonl").exists()


def clear(study):
    "Move the set aside."
    if (study / "synthetic" / NAME).exists():
        move_aside(study, f"synthetic/{NAME}")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return untrained_study(tmp_path_factory.mktemp("shards") / "study")


@pytest.fixture(scope="module")
def calm(study):
    "The set of one undisturbed process."
    stage_generate(study, GenerateConfig(**CFG), plan=PLAN, card=None)
    return bytes_of(study)


def test_layout(calm):
    assert set(calm) == {
        "metadata.jsonl",
        "flags.csv",
        *(f"{c}/{k:06d}.png" for c in PROMPTS for k in range(N)),
    }
    assert len(calm["metadata.jsonl"].splitlines()) == 2 * N


def test_torchrun_two_processes(study, calm):
    clear(study)
    done = subprocess.run(command(study, processes=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bytes_of(study) == calm
    assert study.records()[f"synthetic/{NAME}"]["status"] == "complete"


def test_shares_do_not_overlap(study, calm):
    "The second of two makes its images and no other; the first finds what is left, and completes the set."
    clear(study)
    stage_generate(study, GenerateConfig(**CFG, shard="2/2"), plan=PLAN, card=None)
    folder = study / "synthetic" / NAME
    assert not (folder / "metadata.jsonl").exists()
    assert {p.stem for p in folder.glob("normal/*.png")} == {f"{k:06d}" for k in range(1, N, 2)}
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    noted = Counter(
        json.loads(line)["file_name"]
        for p in (folder / ".parts").glob("*.jsonl")
        for line in p.read_text().splitlines()
    )
    assert set(noted.values()) == {1}
    stage_generate(study, GenerateConfig(**CFG, shard="1/2"), plan=PLAN, card=None)
    assert bytes_of(study) == calm
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_killed_twice(study, calm):
    "SIGKILL at two random moments, one and two processes in turn; the set is that of an undisturbed one."
    clear(study)
    for processes, more in ((1, 1), (2, random.randint(1, 3))):
        kill_after(study, more, processes)
    (study / "synthetic" / NAME / "normal/000000.png").write_bytes(b"damaged")
    stage_generate(study, GenerateConfig(**CFG), plan=PLAN, card=None)
    assert bytes_of(study) == calm


def test_redo_in_two_processes(study, calm):
    "The first process moves the old set aside, the second waits for it."
    before = len(list((study / "synthetic").iterdir()))
    both = [
        subprocess.Popen(
            command(study, dict(num_inference_steps=1), "redo"),
            env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
        )
        for r in range(2)
    ]
    assert [p.wait() for p in both] == [0, 0]
    assert len(list((study / "synthetic").iterdir())) == before + 1
    assert {
        json.loads(line)["steps"] for line in bytes_of(study)["metadata.jsonl"].splitlines()
    } == {1}


def test_lines_cut_by_a_kill_do_not_count(study, tmp_path):
    writer = ImageSetWriter(tmp_path, ["normal/000000.png"])
    writer.parts.mkdir()
    (writer.parts / "1.jsonl").write_text(
        '{"file_name": "normal/000000.png", "sha256": "ab"}\n{"file_name": "normal/0000'
    )
    assert writer.noted() == {
        "normal/000000.png": {"ab": {"file_name": "normal/000000.png", "sha256": "ab"}}
    }


def test_set_completed_by_a_forgotten_process(study, calm):
    "Processes that outlived their launcher finish the set; a new one has then nothing to do."
    clear(study)
    stage_generate(study, GenerateConfig(**CFG), plan=PLAN, card=None)
    writer = ImageSetWriter(study / "synthetic" / NAME, image_names(PLAN.generators[0].images))
    writer.put(Image.new("L", (32, 32)), dict(file_name="normal/000000.png"))
    assert bytes_of(study) == calm
