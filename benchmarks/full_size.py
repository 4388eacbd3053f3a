"""A base of the table at full size with random weights: LoRA training steps, their time and their memory.

python benchmarks/full_size.py [--base sd21-base] [--resolution 256] [--rank 128] [--batch 1] [--steps 2]
    [--precision bf16] [--limit 20]
The peak memory is shown beside the estimate. Needs about 12 GiB of free memory and, for a moment, 1.5 GiB of
disk; not part of the tests.
"""

import argparse, json, os, shutil, tempfile, time
from pathlib import Path

os.environ.setdefault("CXR_QUIET", "1")
import numpy as np, psutil, torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from cxr_synth.base.settings import BASES, PROMPTS, TrainConfig
from cxr_synth.diffusion.families import known_parts, millions
from cxr_synth.diffusion.lora import LORA_FILE, add_lora, save_lora
from cxr_synth.diffusion.preflight import preflight, preflight_text
from cxr_synth.diffusion.small_pipeline import stable_diffusion_noise, write_tokenizer
from cxr_synth.diffusion.trainer import LatentSet, Trainer


def peak_gib() -> float:
    "Most memory that this process has held."
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return info.peak_wset / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(what: str, f):
    start = time.perf_counter()
    out = f()
    print(
        f"{what:<34}{time.perf_counter() - start:7.1f} s   peak so far {peak_gib():5.1f} GiB",
        flush=True,
    )
    return out


def full_size_pipeline(folder, base: str) -> StableDiffusionPipeline:
    "A base's networks with random weights; the vocabulary is the small pipeline's, in the first rows."
    parts = known_parts(base)
    return StableDiffusionPipeline(
        **parts,
        tokenizer=write_tokenizer(folder, PROMPTS.values(), 77),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        scheduler=stable_diffusion_noise(BASES[base].prediction),
    )


def main():
    p = argparse.ArgumentParser()
    for name, default in dict(
        resolution=256, rank=128, batch=1, steps=2, limit=20.0, precision="bf16"
    ).items():
        p.add_argument(f"--{name}", type=type(default), default=default)
    p.add_argument(
        "--base", default="sd21-base", choices=[n for n, b in BASES.items() if not b.scratch]
    )
    p.add_argument("--checkpointing", action="store_true")
    a, root = p.parse_args(), Path(tempfile.mkdtemp())
    cfg = TrainConfig(
        base=a.base,
        method="lora",
        rank=a.rank,
        lora_alpha=a.rank,
        train_batch_size=a.batch,
        mixed_precision=a.precision,
        gradient_checkpointing=a.checkpointing,
        ema_decay=None,
    )
    need = preflight(cfg, a.resolution)
    print(preflight_text(need, psutil.virtual_memory().available / 2**30))
    pipe = timed(
        "networks with random weights", lambda: full_size_pipeline(root / "tokenizer", a.base)
    )
    found = {
        part: round(millions(getattr(pipe, part).parameters()), 2)
        for part in ("unet", "text_encoder", "vae")
    }
    assert found == BASES[a.base].millions, found
    images = np.random.default_rng(0).integers(
        0, 256, (a.batch, a.resolution, a.resolution), dtype=np.uint8
    )
    data = timed(
        "latents", lambda: LatentSet(pipe.vae, images, [PROMPTS["normal"]], np.zeros(a.batch, int))
    )
    weights = timed("LoRA added", lambda: add_lora(pipe.unet, pipe.text_encoder, a.rank))
    if a.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    trainer = Trainer(
        pipe,
        data,
        root / "run.pt",
        total=a.steps,
        batch=a.batch,
        peak=1e-4,
        warmup=1,
        precision=a.precision,
    )
    base = pipe.unet.conv_out.weight.clone()
    log = timed(f"{a.steps} steps, batch {a.batch}, {a.resolution} px", trainer.run)
    assert (
        len(log) == a.steps
        and all(np.isfinite(r["loss"]) for r in log)
        and torch.equal(base, pipe.unet.conv_out.weight)
    )
    assert all(p.abs().sum() > 0 for p in weights if p.requires_grad)  # B has left zero
    timed(
        "LoRA saved", lambda: save_lora(root / "lora", pipe.unet, pipe.text_encoder, a.base, a.rank)
    )
    with safe_open(root / "lora" / LORA_FILE, "pt") as f:
        numbers = sum(int(np.prod(f.get_slice(k).get_shape())) for k in list(f.keys()))
    estimate = sum(need["memory"].values())
    print(
        json.dumps(
            dict(
                lora_M=round(numbers / 1e6, 2),
                losses=[round(r["loss"], 3) for r in log],
                peak_gib=round(peak_gib(), 1),
                estimate_gib=round(estimate, 1),
                threads=torch.get_num_threads(),
            )
        )
    )
    shutil.rmtree(root)
    assert numbers == sum(p.numel() for p in weights)
    if peak_gib() > a.limit:
        raise SystemExit(f"peak memory {peak_gib():.1f} GiB is above the limit of {a.limit:g}")


if __name__ == "__main__":
    main()
