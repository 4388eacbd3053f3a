"""The proof that the GPU path works, for whoever holds a GPU: one command, offline, nine minutes at most.

python benchmarks/gpu.py [--scale full] [--batch 8] [--minutes 9] [--out gpu-proof] [--only train draw]

Stable Diffusion 2.1 base with random weights is built on the card and saved; the package's own functions then
train it, preview, stop, go on and draw. Every step gives a row; one that fails is a row with its error, and
the others go on. `--out` gets gpu.json and gpu.md. A card of 40 GB needs `--batch 4`. `--scale small` does
the same steps on a CPU in about a minute, with a pipeline of 32 px. Exit status 1: a step failed, or the
time was up before it.
"""

import argparse, gc, json, os, shutil, subprocess, sys, tempfile, time, warnings

START = time.perf_counter()  # the imports count, too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CXR_QUIET", "1")
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np, torch
from PIL import Image
from transformers import CLIPTokenizer
from full_size import full_size_pipeline
from train_speed import bare, seconds
from cxr_synth.base.compute import pick_device, pick_precision, progress
from cxr_synth.base.files import CxrError, library_versions, now, write_json, write_text
from cxr_synth.base.settings import PROMPTS, resolve
from cxr_synth.diffusion.dreambooth import choose_weights, class_task, fine_tune, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.preflight import preflight
from cxr_synth.diffusion.sampling import Sampler, generate_synthetic_dataset, load_finetuned_model
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.diffusion.trainer import Previews

GIB = 2**30
LEFT_GIB = 0.5  # on the card after a class: more is a network that was not let go
SAME_LOSS, SAME_UPDATE = 1e-3, 0.1  # relative: what a card's order of summation may change


@dataclass(frozen=True)
class Scale:
    "How large everything is."

    resolution: int  # px
    batch: int  # instance images in a step, and as many of the prior
    timed: int  # training steps
    steps: int  # of the sampler
    batches: tuple  # images per call that are tried
    rank: int = 128  # of LoRA
    need: float = 0  # GiB of free disk: two checkpoints of all weights, and two models


SCALES = {
    "full": Scale(512, 8, timed=6, steps=30, batches=(8, 16, 32), need=30),
    "small": Scale(32, 2, timed=2, steps=2, batches=(2, 4), rank=4),
}


COMPILER = {"cuda": {}, "mps": {}, "cpu": dict(backend="eager")}  # the last needs no C++ compiler


class Unproven(Exception):
    "A step ran, and what it found is not what it should be."


def demand(holds: bool, otherwise: str):
    if not holds:
        raise Unproven(otherwise)


def tiny(folder):
    return tiny_pipeline(folder, PROMPTS.values(), SCALES["small"].resolution)


class Proof:
    "The base, the settings, and the rows that the steps give."

    def __init__(self, scale: str, device: str, batch: int, minutes: float, root: Path):
        self.scale = replace(SCALES[scale], **({"batch": batch} if batch else {}))
        self.full = scale == "full"
        self.device = pick_device(device)
        self.precision = pick_precision(self.device)
        self.root, self.base = root, root / "base"
        self.minutes, self.rows = minutes, []

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def step(self, name: str, need: float, do, *args):
        "One row: what `do` found, or its error. It is not begun with less than `need` seconds left."
        self.clear()
        found, begun = {}, time.perf_counter()
        row = dict(step=name, state="ok", seconds=0.0, error="", found=found)
        left = 60 * self.minutes - (begun - START)
        try:
            if left < need * self.full:
                row |= dict(state="not begun", error=f"{left:.0f} s were left of {need:.0f} s")
            else:
                do(self, found, *args)
        except Exception as e:  # whatever it is, it is this row's error, and the others go on
            row |= dict(state="failed", error=f"{type(e).__name__}: {e}"[:600])
        row["seconds"] = round(time.perf_counter() - begun, 2)
        self.rows.append(row)
        print(line_of(row), flush=True)

    def clear(self):
        "Nothing of a step is left to the next one."
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def config(self, preset: str, **more):
        "The settings of a preset at this size, one batch a step, without previews and held-out images."
        size = dict(train_batch_size=self.scale.batch, gradient_accumulation_steps=1)
        size |= dict(rank=self.scale.rank, lora_alpha=self.scale.rank, prior_loss_weight=1.0)
        off = dict(preview_steps=None, heldout_images=None, lr_warmup_steps=1)
        where = dict(base=str(self.base), device=self.device, mixed_precision=self.precision)
        long = dict(max_train_steps=10**6, checkpoint_steps=10**6)
        return resolve("train", preset, **size | off | where | long | more)

    def task(self, label: int = 0):
        "Images of noise, and others as the prior."
        side, n = self.scale.resolution, 2 * self.scale.batch
        a, b = np.random.default_rng(label).integers(0, 256, (2, n, side, side), dtype=np.uint8)
        prompts = list(PROMPTS.values())
        return class_task(a, prompts[label], prior=(b, prompts[1 - label]))

    def trainer(self, cfg, name: str):
        return make_trainer(load_pipeline(self.base), self.task(), self.root / f"{name}.pt", cfg)

    def take(self, trainer):
        "A function that takes one step."
        bar = progress(total=10**9)
        return lambda: trainer.loop.take_step(trainer.losses, "proof", bar)


def filled_up(folder, size: int) -> CLIPTokenizer:
    "A tokenizer with as many tokens as the text encoder knows; no text is spelled with the new ones."
    path = folder / "vocab.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    words |= {f"<|filler{k}|></w>": k for k in range(len(words), size)}
    write_text(path, json.dumps(words))
    return CLIPTokenizer.from_pretrained(folder)


def build(p: Proof, found: dict):
    "The base with random weights, as a folder."
    if p.full:
        with torch.device(p.device):
            pipe = full_size_pipeline(p.root / "tokenizer", "sd21-base")
        pipe.tokenizer = filled_up(p.root / "tokenizer", pipe.text_encoder.config.vocab_size)
    else:
        pipe = tiny(p.root / "tokenizer")
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    found["millions"] = [
        round(sum(x.numel() for x in part.parameters()) / 1e6, 2) for part in parts
    ]
    save_pipeline(pipe, p.base)


def waits(step, steps: int) -> tuple[float, dict]:  # per step; place in the code -> how often
    "How often a training step waits for the card."
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [w for w in seen if "synchronizing CUDA" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)
    return len(told) / steps, dict(places.most_common(4))


def train(p: Proof, found: dict, preset: str):
    "Training steps beside a bare loop of the same forward, backward and AdamW; memory beside the estimate."
    cfg, images = p.config(preset), 2 * p.scale.batch
    found["estimate_gib"] = round(
        sum(preflight(cfg, p.scale.resolution, True)["memory"].values()), 2
    )
    trainer = p.trainer(cfg, preset)
    step = p.take(trainer)
    seconds(step, 2, p.device)
    found["images_per_s"] = round(images / seconds(step, p.scale.timed, p.device), 2)
    if p.cuda:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        found["waits_per_step"], found["waits_at"] = waits(step, 10)
    trainer.loop.check("proof")  # every loss was a finite number
    found["loss"] = round(trainer.loop.log.recent(), 4)
    del trainer, step
    p.clear()
    plain = load_pipeline(p.base)
    choose_weights(plain, cfg)
    for part in (plain.unet, plain.text_encoder):
        part.to(p.device)
    step = bare(plain, replace(cfg, train_batch_size=images), p.device)
    seconds(step, 2, p.device)
    found["bare_images_per_s"] = round(images / seconds(step, p.scale.timed, p.device), 2)
    found["ratio"] = round(found["images_per_s"] / found["bare_images_per_s"], 3)


def half_precision(p: Proof, found: dict, preset: str):
    "Train, preview, train in float16: trained weights stay float32, and the previews show something."
    found["precision"] = half = "fp16" if p.device != "cpu" else "bf16"
    cfg, folder = p.config(preset, mixed_precision=half), p.root / f"previews-{preset}"
    trainer = p.trainer(cfg, f"half-{preset}")
    params = trainer.loop.optimizer.params
    before = {k: v.detach().clone() for k, v in list(params.items())[:20]}
    how = dict(every=3, n=2, steps=p.scale.steps)
    trainer.loop.hooks.append(Previews(trainer, folder, [PROMPTS["normal"]], **how))
    step = p.take(trainer)
    for _ in range(6):  # previews before the first and the fourth
        step()
    trainer.loop.check("proof")
    found["losses"] = [round(row["loss"], 4) for row in trainer.loop.log.table()]
    found["previews"] = sorted(x.name for x in folder.glob("*.png"))
    kinds = {str(v.dtype) for v in params.values()}
    moved = any(not torch.equal(before[k], params[k]) for k in before)
    demand(kinds == {"torch.float32"}, f"trained weights have become {sorted(kinds)}")
    demand(len(found["previews"]) == 2, "two previews should be there")
    demand(moved, "no weight has moved: every step was skipped")
    demand(all(grey_spread(x) > 1 for x in folder.glob("*.png")), "a preview shows nothing")


def grey_spread(path) -> float:
    return float(np.asarray(Image.open(path)).std())


class Killed(Exception):
    "In the place of a lost machine."


def kill_at(step: int):
    def hook(loop):
        if loop.step == step:
            raise Killed

    return hook


def resume(p: Proof, found: dict):
    "Kill a run at a step and start it again: losses and weights are those of one that nobody killed."
    more = dict(max_train_steps=8, checkpoint_steps=3, learning_rate=1e-3)
    cfg = p.config("a100-80gb-lora", **more)
    calm = p.trainer(cfg, "calm")
    start = {k: v.detach().cpu().clone() for k, v in calm.loop.optimizer.params.items()}
    losses = [row["loss"] for row in calm.run("calm")]
    end = {k: v.detach().cpu().clone() for k, v in calm.loop.optimizer.params.items()}
    del calm
    p.clear()
    killed = p.trainer(cfg, "killed")
    killed.loop.hooks.append(kill_at(5))
    try:
        killed.run("killed")
    except Killed:
        found["killed_at"] = killed.loop.step
    del killed
    p.clear()
    again = p.trainer(cfg, "killed")
    found["resumed_at"] = at = again.loop.step
    demand(at == 3, f"it went on at step {at} and not at its last checkpoint, 3")
    later = [row["loss"] for row in again.run("again")]
    found["loss_difference"] = max(abs(a / b - 1) for a, b in zip(later[at:], losses[at:]))
    here = again.loop.optimizer.params
    off = sum(float((here[k].detach().cpu() - end[k]).square().sum()) for k in end) ** 0.5
    went = sum(float((start[k] - end[k]).square().sum()) for k in end) ** 0.5
    found["update_difference"] = off / went
    demand(found["loss_difference"] < SAME_LOSS, "the losses are not those of the calm run")
    demand(found["update_difference"] < SAME_UPDATE, "the weights are not those of the calm run")


def poison(pipe):
    "A U-Net that returns NaN."
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    return pipe


def nan_train(p: Proof, found: dict):
    "Training a U-Net that returns NaN ends in an error that says so, and in no model."
    cfg = p.config("a100-80gb-lora", max_train_steps=2)
    out, task = p.root / "nan-model", p.task()
    try:
        fine_tune(str(p.base), lambda pipe: poison(pipe) and task, out, p.root / "nan.pt", cfg)
    except CxrError as e:
        found["error"] = str(e).splitlines()[0]
    demand("error" in found, "training went on, and nothing was said")
    demand(not (out / "provenance.json").exists(), "a model was saved")


def nan_draw(p: Proof, found: dict):
    "Drawing from a U-Net that returns NaN ends in an error, and in no black images."
    pipe, out = poison(load_finetuned_model(p.base, p.device, p.precision)), p.root / "nan-images"
    try:
        generate_synthetic_dataset(pipe, PROMPTS["normal"], 2, str(out), 2, 2)
    except CxrError as e:
        found["error"] = str(e).splitlines()[0]
    found["images"] = len(list(out.glob("*.png")))
    demand(not found["images"], f"{found['images']} black images were written")
    demand("error" in found, "nothing was said")


def draw(
    p: Proof, found: dict, pipes: dict, precision: str, batch: int, last=False, compiled=False
):
    "Images per second of the package's sampler, after a short call that warms up."
    if precision not in pipes:
        pipes.clear()  # one at a time on the card
        pipes[precision] = load_finetuned_model(p.base, p.device, precision)
    pipe = pipes[precision]
    cfg = resolve("generate", "a100-80gb", num_inference_steps=p.scale.steps)
    sampler = Sampler(pipe, PROMPTS["normal"], p.scale.resolution, cfg, batch)
    if last:
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
    if compiled and not pipes.get("compiled"):
        pipe.unet.compile_repeated_blocks(**COMPILER[p.device])
        pipes["compiled"] = True
    seeds = list(range(batch))
    sampler.cfg = replace(cfg, num_inference_steps=2)
    found["first_call_s"] = round(seconds(lambda: sampler(seeds), 1, p.device), 2)
    sampler.cfg, drawn = cfg, []
    taken = seconds(lambda: drawn.append(sampler(seeds)), 1, p.device)
    found["images_per_s"] = round(batch / taken, 3)
    if p.cuda:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    demand(bool(np.isfinite(drawn[0]).all()), "not all pixels are finite numbers")
    demand(float(drawn[0].std()) > 0.004, "the images show nothing")


def both_classes(p: Proof, found: dict):
    "Both classes, all weights, in one process that may use 40 GB; what is left on the card after each."
    free = shutil.disk_usage(p.root).free / GIB
    demand(free > p.scale.need, f"{free:.0f} GiB of disk are free; it takes {p.scale.need:.0f}")
    more = dict(train_batch_size=4, gradient_accumulation_steps=4) if p.full else {}
    cfg = p.config("a100-40gb", max_train_steps=2, **more)
    if p.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 40e9 / total))
    try:
        for label, cls in enumerate(PROMPTS):
            _one_class(p, found, cfg, label, cls)
    finally:
        if p.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _one_class(p: Proof, found: dict, cfg, label: int, cls: str):
    "Train and save the model of one class, and look at the card."
    out, path = p.root / f"model-{cls}", p.root / f"model-{cls}.pt"
    log = fine_tune(str(p.base), p.task(label), out, path, cfg, label)
    demand(len(log) == 2 and (out / "provenance.json").exists(), f"the model of {cls} is not whole")
    if p.cuda:
        found[f"{cls}_peak_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        found[f"{cls}_left_gib"] = left = round(torch.cuda.memory_reserved() / GIB, 2)
        demand(left < LEFT_GIB, f"{left} GiB stayed on the card after {cls}")
        torch.cuda.reset_peak_memory_stats()
    found[f"{cls}_loss"] = round(log[-1]["loss"], 4)
    shutil.rmtree(out)
    path.unlink(missing_ok=True)


def machine(p: Proof) -> dict:
    "What this was measured on."
    about = dict(device=p.device, python=sys.version.split()[0], threads=torch.get_num_threads())
    about["versions"] = library_versions()
    if p.cuda:
        card = torch.cuda.get_device_properties(0)
        about |= dict(card=card.name, memory_gib=round(card.total_memory / GIB, 1))
        about |= dict(
            cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=driver()
        )
    return about


def driver() -> str:
    "Version of the card's driver; empty where nvidia-smi is not found."
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def line_of(row: dict) -> str:
    "A row as a line of text."
    what = "; ".join(f"{k} {v}" for k, v in row["found"].items())
    error = " ".join(row["error"].split())
    return f"{row['step']:<34} {row['state']:<9} {row['seconds']:7.1f} s  {error or what}"


def table(result: dict) -> str:
    "The result as Markdown."
    about = result["machine"]
    named = [about.get("card", about["device"]), f"{about.get('memory_gib', '?')} GiB"]
    named += [f"driver {about.get('driver', 'none')}"]
    named += [f"{k} {about['versions'].get(k, '?')}" for k in ("torch", "diffusers", "cxr_synth")]
    said = "all steps passed" if result["passed"] else "NOT all steps passed"
    lines = [f"{', '.join(named)}; scale {result['scale']}, {result['seconds']:.0f} s: {said}", ""]
    lines += ["| step | state | seconds | found |", "|---|---|---|---|"]
    for row in result["rows"]:
        what = "; ".join(f"{k} {v}" for k, v in row["found"].items())
        told = " ".join(f"{row['error']} {what}".split()).replace("|", "\\|")
        lines.append(f"| {row['step']} | {row['state']} | {row['seconds']:.1f} | {told} |")
    return "\n".join(lines) + "\n"


def drawings(p: Proof) -> list:
    "The rows of `draw`: name, and its arguments."
    b, *others = p.scale.batches
    half = ("fp16", "bf16") if p.device != "cpu" else ("no", "no")
    rows = [(f"draw, {half[0]}", half[0], b), (f"draw, {half[1]}, plain", half[1], b)]
    rows += [(f"draw, {half[1]}, channels last", half[1], b, True)]
    rows += [(f"draw, {half[1]}, {n} a call", half[1], n) for n in others]
    rows += [(f"draw, {half[1]}, compiled", half[1], b, False, True)]
    return rows + [(f"draw, {half[1]}, compiled, channels last", half[1], b, True, True)]


def prove(p: Proof, only: list[str]):
    "All steps, the surest first; `only`: those whose names begin so."
    pipes = {}
    steps = [
        ("train, all weights", 60, train, "a100-80gb"),
        ("train, LoRA", 60, train, "a100-80gb-lora"),
        ("resume", 60, resume),
        ("half precision, LoRA", 30, half_precision, "a100-80gb-lora"),
        ("half precision, all weights", 30, half_precision, "a100-80gb"),
        ("NaN, training", 20, nan_train),
        ("NaN, drawing", 20, nan_draw),
        *[(name, 20, draw, pipes, *how) for name, *how in drawings(p)],
        ("both classes in 40 GB", 120, both_classes),
    ]
    p.step("build the base", 0, build)
    for name, need, do, *args in steps:
        if not name.startswith("draw"):
            pipes.clear()
        if any(name.lower().startswith(word.lower()) for word in only or [""]):
            p.step(name, need, do, *args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=0, help="instance images in a step; 0: 8")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", default="gpu-proof")
    parser.add_argument("--only", nargs="*", default=[], help="steps whose names begin so")
    args, root = parser.parse_args(), Path(tempfile.mkdtemp())
    p = Proof(args.scale, args.device, args.batch, args.minutes, root)
    if p.full and not p.cuda:
        parser.error(f"the full scale needs a CUDA card, and this is {p.device}: --scale small")
    try:
        prove(p, args.only)
    finally:
        shutil.rmtree(root)
    result = dict(scale=args.scale, made=now(), machine=machine(p), rows=p.rows)
    result["seconds"] = round(time.perf_counter() - START, 1)
    result["passed"] = all(row["state"] == "ok" for row in p.rows)
    write_json(Path(args.out) / "gpu.json", result)
    write_text(Path(args.out) / "gpu.md", table(result))
    print(f"{args.out}/gpu.md: {result['seconds']:.0f} s", flush=True)
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
