"""torchrun starts a command N times: models are shared out among the processes and come out as from one;
whatever cannot be shared is refused before it writes anything.
"""

import json, os, subprocess, sys
from types import SimpleNamespace

import pytest, torch
from cxr_synth.base.compute import pick_device
from cxr_synth.base.files import CxrError, digest_file
from cxr_synth.base.records import Study
from cxr_synth.base.settings import PROMPTS, DataConfig
from cxr_synth.diffusion.command import train_dreambooth
from cxr_synth.diffusion.dreambooth import generate_class_images
from cxr_synth.diffusion.generator import trained_record
from cxr_synth.diffusion.pipelines import save_pipeline
from cxr_synth.diffusion.sampling import generate_synthetic_dataset
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.run import run, run_stage

NAMES = ("real100-rep0", "real050-rep0")
CODE = """
import json, sys
from pathlib import Path
from cxr_synth.base.records import Study
from cxr_synth.base.settings import TrainConfig
from cxr_synth.diffusion import dreambooth, generator
from cxr_synth.protocol.plan import Plan, PlannedGenerator
from cxr_synth.stages.train import stage_train

root, cfg, names = sys.argv[1:]

def counted(inner, what):
    def call(*args, **kw):
        with open(Path(root).parent / "done.txt", "a") as f:
            f.write(f"{what(args)}\\n")
        return inner(*args, **kw)
    return call

generator.fine_tune = counted(generator.fine_tune, lambda args: args[6])  # its description
dreambooth.sample_images = counted(dreambooth.sample_images, lambda args: "class images")
plan = Plan(generators=tuple(PlannedGenerator(name, images="2") for name in names.split()))
stage_train(Study(root), TrainConfig(**json.loads(cfg)), plan=plan)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A base, and a study with data alone."
    folder = tmp_path_factory.mktemp("start")
    prompts = [*PROMPTS.values(), "a chest xray image"]
    save_pipeline(tiny_pipeline(folder / "tokenizer", prompts, 32), folder / "base")
    return folder


def begin(start, tmp_path, names, processes, **more):
    "Train with so many processes; what was trained, and the digests of all weights."
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(patients=120, resolution=32))
    cfg = dict(
        base=str(start / "base"),
        max_train_steps=2,
        train_batch_size=4,
        preview_steps=None,
        heldout_images=4,
        prior="generated",
        prior_loss_weight=1.0,
        num_class_images=4,
        mixed_precision="no",
        device="cpu",
    )
    command = [sys.executable, "-c", CODE, str(study.root), json.dumps(cfg | more), names]
    started = []
    for rank in range(processes):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
        env = env if processes > 1 else dict(os.environ)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=env, **pipes))
    said = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    done = sorted((tmp_path / "done.txt").read_text().splitlines())
    files = sorted((study / "models").rglob("*.safetensors"))
    weights = {p.relative_to(study.root).as_posix(): digest_file(p) for p in files}
    return study, done, weights


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_share_the_models(start, tmp_path, method):
    names = " ".join(NAMES if method == "lora" else NAMES[:1])
    more = dict(method=method, rank=2, lora_alpha=2)
    results = {}
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        study, done, weights = begin(start, tmp_path / str(n), names, n, **more)
        models = sorted(f"{name} {cls}" for name in names.split() for cls in PROMPTS)
        assert [line for line in done if line != "class images"] == models  # each once
        assert done.count("class images") == 1  # one batch, drawn by one process
        for name in names.split():
            assert trained_record(study, name)["status"] == "complete"
            rows = (study / f"models/{name}/train.csv").read_text()
            assert all(f",{cls}," in rows for cls in PROMPTS), rows
        results[n] = weights
    assert results[1] == results[2] and len(results[1]) >= 2


def test_generators_with_a_base_of_their_own_stay_whole(start, tmp_path):
    few = dict(vae_steps=2, base_steps=2, vae_batch_size=4, base_batch_size=4)
    cfg = few | dict(base="tiny", prior="other", prior_loss_weight=None)
    _, done, weights = begin(start, tmp_path, " ".join(NAMES), 2, **cfg)
    assert done == sorted(f"{name} {cls}" for name in NAMES for cls in PROMPTS)
    assert {f"models/{name}/base/unet/diffusion_pytorch_model.safetensors" for name in NAMES} < set(
        weights
    )


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


@pytest.mark.parametrize(
    "command", ["run", "data", "plan", "quality", "experiments", "open-test", "report", "guide"]
)
def test_commands_for_one_process(tmp_path, cxr_synth_command, two_processes, command):
    done = cxr_synth_command(command, tmp_path / "s")
    assert done.status == 2 and not (tmp_path / "s").exists()
    for text in (f"cxr-synth {command} is for one", "process 2 of 2", "without torchrun", "train"):
        assert text in done.err, done.err


def test_status_is_for_all(study_copy, cxr_synth_command, two_processes):
    assert cxr_synth_command("status", study_copy.root).status == 0


def test_calls_for_one_process(tmp_path, two_processes):
    flags = dict(pretrained_model_name_or_path="x", instance_data_dir="x", instance_prompt="x")
    calls = {
        "train_dreambooth": lambda: train_dreambooth(output_dir=str(tmp_path / "m"), **flags),
        "generate_class_images": lambda: generate_class_images(2, str(tmp_path / "c")),
        "generate_synthetic_dataset": lambda: generate_synthetic_dataset(None, "x", 2, "s"),
        "cxr-synth run": lambda: run(tmp_path / "s"),
        "cxr-synth quality": lambda: run_stage(tmp_path / "s", "quality"),
    }
    for name, call in calls.items():
        with pytest.raises(CxrError, match=f"{name} is for one process"):
            call()
    assert not list(tmp_path.iterdir())


def test_each_process_has_a_device_of_its_own(monkeypatch):
    chosen = []
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, set_device=chosen.append
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert pick_device() == "cuda" and chosen == []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device() == pick_device("cuda") == "cuda"
    assert chosen == [0, 0, 1, 1, 0, 0]
