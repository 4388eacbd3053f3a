"""Generation on the small pipeline, untrained, 64 px.

Images/s of the whole stage, of the bare pipeline, and of the guide's own loop.

python benchmarks/generate.py [images] [rounds]      medians of the rounds, taken in turn (defaults 160 and 3)
python benchmarks/generate.py thousand               1,000 images with the settings of `tiny`: minutes and GiB
python benchmarks/generate.py processes              64 images by 1, 2 and 4 processes: seconds, same bytes
"""

import os, sys, tempfile, time

os.environ["CXR_QUIET"] = "1"
if sys.argv[1:] == ["processes"]:
    os.environ["OMP_NUM_THREADS"] = "1"
from functools import partial
from pathlib import Path
from statistics import median

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from cxr_synth.base.compute import autocast, pick_precision
from cxr_synth.base.records import Study, open_stage
from cxr_synth.base.settings import DataConfig, GenerateConfig, PROMPTS, TrainConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.protocol.plan import Plan, PlannedGenerator
from cxr_synth.stages.generate import stage_generate
from cxr_synth.diffusion.sampling import (
    Sampler,
    even_batch_size,
    find_batch_size,
    load_finetuned_model,
    start_noise,
)
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

NAME = "real100-rep0"
PROMPT = PROMPTS["normal"]
STEPS = GenerateConfig().num_inference_steps
SCALE = GenerateConfig().guidance_scale


def make_study(root):
    study = Study(root)
    stage_data(study, DataConfig(patients=250))
    stage = open_stage(study, "train", f"models/{NAME}", TrainConfig())
    for k, cls in enumerate(PROMPTS):
        tiny_pipeline(study / "tokenizer", PROMPTS.values(), 64, seed=k).save_pretrained(
            stage.path / cls
        )
    stage.finish()
    return study


def plan(n):
    images = {"normal": n // 2, "pneumonia": n - n // 2}
    return Plan(generators=(PlannedGenerator(NAME, images=images),))


def timed(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def whole_stage(study, n, cfg):
    stage_generate(study, cfg, True, plan(n), card=None)
    (study / f"synthetic/{NAME}").rename(study / f"synthetic/used{time.time_ns()}")


def bare(pipe, n, cfg, batch_size):
    "The pipeline itself, in the calls of the stage, same attention, precision and layout: model time only."
    precision = Sampler(pipe, PROMPT, 64, cfg, batch_size).precision
    for _ in range(2 * -(-(n // 2) // batch_size)):
        with torch.inference_mode(), autocast("cpu", precision):
            pipe(
                [PROMPT] * batch_size,
                latents=start_noise(range(batch_size), 4, 16),
                num_inference_steps=STEPS,
                guidance_scale=SCALE,
                output_type="pt",
            )


def guide(pipe, num_images, output_dir, batch_size=8):
    "The loop of the guide's section 8, on a CPU."
    os.makedirs(output_dir, exist_ok=True)
    generated = 0
    while generated < num_images:
        current_batch = min(batch_size, num_images - generated)
        images = pipe(
            [PROMPT] * current_batch,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=torch.Generator("cpu").manual_seed(generated),
        ).images
        for i, img in enumerate(images):
            img.save(f"{output_dir}/synthetic_{generated + i:05d}.png")
        generated += current_batch


def guide_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to("cpu")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(study, n, rounds):
    plain = guide_pipeline(study / f"models/{NAME}/normal")
    batch_size = even_batch_size(
        n // 2, find_batch_size(plain, 64, GenerateConfig())[0]
    )  # as the stage chooses it
    jobs = {"guide, float32": lambda m: guide(plain, m, study / "guide")}
    for name, precision in (("float32", "no"), ("bf16", "bf16")):
        cfg = GenerateConfig(mixed_precision=precision, device="cpu")
        ours = load_finetuned_model(study / f"models/{NAME}/normal", "cpu")
        jobs[f"bare, {name}"] = lambda m, cfg=cfg, ours=ours: bare(ours, m, cfg, batch_size)
        jobs[f"stage, {name}"] = lambda m, cfg=cfg: whole_stage(study, m, cfg)
    times = {k: [] for k in jobs}
    for f in jobs.values():
        f(8)  # warm up
    for _ in range(rounds):
        for k, f in jobs.items():
            times[k].append(timed(f, n))
    speed = {k: n / median(t) for k, t in times.items()}
    for k, v in speed.items():
        print(f"{k:16} {v:6.2f} images/s   ({min(times[k]):.1f} to {max(times[k]):.1f} s)")
    for name in ("float32", "bf16"):
        print(
            f"{name}: stage / bare {speed[f'stage, {name}'] / speed[f'bare, {name}']:.2f}   stage "
            f"/ guide {speed[f'stage, {name}'] / speed['guide, float32']:.2f}"
        )
    print(f"threads {torch.get_num_threads()}, {n} images, batch {batch_size}")


def processes(study, n=64):
    import subprocess

    code = (
        "import json, sys\n"
        "from cxr_synth.base.records import Study\n"
        "from cxr_synth.base.settings import GenerateConfig\n"
        "from cxr_synth.protocol.plan import Plan\n"
        "from cxr_synth.stages.generate import stage_generate\n"
        "plan = Plan.from_json(json.loads(sys.argv[2]))\n"
        "cfg = GenerateConfig(batch_size=8, threads=1, device='cpu')\n"
        "stage_generate(Study(sys.argv[1]), cfg, False, plan, None)"
    )
    import json

    torchrun = ["-m", "torch.distributed.run", "--master-port", "0", "--no-python"]
    job = ["-c", code, study.root, json.dumps(plan(n).to_json())]
    found = []
    for p in (1, 2, 4):
        launcher = [] if p == 1 else [*torchrun, "--nproc-per-node", str(p), sys.executable]
        command = [sys.executable, *launcher, *job]
        seconds = timed(partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL))
        folder = study / f"synthetic/{NAME}"
        found.append(
            {
                q.relative_to(folder): q.read_bytes()
                for q in folder.rglob("*")
                if q.is_file() and q.name != "stage.json"
            }
        )
        folder.rename(study / f"synthetic/by{p}")
        print(
            f"{p} processes: {seconds:.0f} s, {len(found[-1])} files, "
            f"{'the same bytes' if found[-1] == found[0] else 'OTHER BYTES'}"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        study = make_study(Path(root) / "study")
        if sys.argv[1:] == ["processes"]:
            processes(study)
        elif sys.argv[1:] == ["thousand"]:
            seconds = timed(stage_generate, study, GenerateConfig(), False, plan(1000), None)
            import resource

            print(
                f"1,000 images: {seconds / 60:.1f} minutes, peak "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, "
                f"{study.records()[f'synthetic/{NAME}']['batch_size']} images per call, precision "
                f"{pick_precision('cpu')}"
            )
        else:
            compare(study, *map(int, (sys.argv[1:] + ["160", "3"][len(sys.argv) - 1 :])))
