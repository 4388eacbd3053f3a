"""Train the small base that ships with the package, on drawings: WORK/small-xray, for --train.base.

    python benchmarks/make_base.py WORK [vae_steps unet_steps]

The drawings (`base_drawings.py`) show adults, other machines, and findings that no study here is about.
First the autoencoder, then U-Net and text encoder. WORK gets the checkpoints, so that the same command goes
on after a stop, previews and, at the end, the folder `small-xray` in Stable Diffusion's format with float16
weights. To ship it, copy that folder to cxr_synth/models."""

import json
import sys
from pathlib import Path

import joblib
import numpy as np
import torch
from base_drawings import FINDINGS, draw
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from cxr_synth.base.compute import pick_precision
from cxr_synth.base.files import digest_file, library_versions, write_json, write_text
from cxr_synth.base.loop import Loop, TrainedPart
from cxr_synth.base.settings import PROMPTS
from cxr_synth.diffusion.pipelines import save_pipeline
from cxr_synth.diffusion.small_pipeline import (
    tiny_text_encoder,
    to_pixels,
    train_vae,
    write_tokenizer,
)
from cxr_synth.diffusion.trainer import LatentSet, Previews, Trainer
from cxr_synth.diffusion.tuned_decoder import film_error
from cxr_synth.diffusion.wavelets import WaveletVAE, fit_grain, fit_wavelet_scales

SEED, SIZE, DRAWINGS = 0, 64, 40_000
VAE_STEPS, VAE_BATCH, VAE_PEAK = 1200, 64, 2e-3
STEPS, BATCH, PEAK = 9000, 128, 1e-3
UNSEEN = 500  # drawings that the autoencoder is judged by
CARD = """---
library_name: diffusers
license: apache-2.0
tags: [stable-diffusion, text-to-image, chest-xray, synthetic]
---
# A small base for chest X-rays of 64 px

A pipeline in Stable Diffusion's format that was trained on {drawings:,} drawings, and on no film of any
patient: adults, several machines, and the findings {findings}.
It has never seen a pneumonia, nor any child of the drawn studies. It is a starting point for fine-tuning
on two CPU cores; its own images say nothing about medicine.

Its autoencoder is `cxr_synth.diffusion.wavelets.WaveletVAE`, so diffusers loads it where cxr_synth is
installed; a round trip of drawings that it never saw is off by {error:.1f} grey levels.

Made by `benchmarks/make_base.py`: {vae_steps:,} steps of {vae_batch} for the autoencoder, {steps:,} of
{batch} for U-Net and text encoder, seed {seed}. Versions and the hash of each file: `provenance.json`.
Licence: Apache 2.0.
"""


def all_drawings() -> tuple[np.ndarray, list[str]]:
    "Films (N, 64, 64) and what is said of each."
    jobs = (joblib.delayed(draw)(k, SIZE, SEED) for k in range(DRAWINGS))
    made = joblib.Parallel(n_jobs=joblib.cpu_count() if DRAWINGS > 1000 else 1)(jobs)
    return np.stack([d.film for d in made]), [d.caption for d in made]


def small_unet() -> UNet2DConditionModel:
    "4 M weights on 8 x 8 places of 8 numbers; attention to the words below the first level."
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 96, 96),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,  # diffusers reads it as the number of heads
    )


def untrained(folder: Path, films: np.ndarray, prompts: list[str]) -> StableDiffusionPipeline:
    "The pipeline before its first step."
    words = [*prompts, *PROMPTS.values(), "a chest xray image", "a chest x-ray radiograph, medical"]
    tokenizer = write_tokenizer(folder / "tokenizer", words)
    torch.manual_seed(SEED)
    vae = WaveletVAE(latent_channels=8)
    fit_wavelet_scales(vae, to_pixels(films[:4000]))
    noise = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,  # the last trace of a film must go
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_autoencoder(pipe, films: np.ndarray, work: Path, steps: int) -> float:
    "In place; how far a round trip of unseen drawings is off, in grey levels."
    unseen, seen = films[-UNSEEN:], films[:-UNSEEN]
    about = dict(drawings=len(films), seed=SEED, batch=VAE_BATCH, peak=VAE_PEAK)
    how = dict(
        items=VAE_BATCH,
        ema_decay=0.998,
        warmup=100,
        config=about | dict(precision=pick_precision("cpu")),
    )
    loop = Loop(dict(vae=TrainedPart(pipe.vae, VAE_PEAK)), work / "vae.pt", steps, **how)
    train_vae(pipe.vae, seen, loop, VAE_BATCH, SEED, precision=pick_precision("cpu"))
    pipe.vae.eval().requires_grad_(False)
    fit_grain(pipe.vae, unseen)
    return film_error(pipe.vae, unseen)


def train_unet(pipe, films: np.ndarray, captions: list[str], work: Path, steps: int):
    "U-Net and text encoder, in place."
    prompts = sorted(set(captions))
    which = np.array([prompts.index(c) for c in captions])
    data = LatentSet(pipe.vae, films, prompts, which)
    about = dict(drawings=len(films), seed=SEED, batch=BATCH, peak=PEAK)
    how = dict(drop=0.1, warmup=100, ema_decay=0.998, seed=SEED, precision=pick_precision("cpu"))
    pipe.unet.set_attn_processor(AttnProcessor())  # torch's own is slow for bfloat16 on a CPU
    trainer = Trainer(pipe, data, work / "unet.pt", steps, BATCH, PEAK, config=about, **how)
    trainer.loop.hooks.append(Previews(trainer, work / "previews", prompts[::40], 500, n=8))
    trainer.run("base")


def save(pipe, out: Path, **made):
    "Write it with float16 weights, its card, and what it was made from."
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        torch.nn.Module.to(part, torch.float16)
    save_pipeline(pipe, out)
    facts = dict(drawings=DRAWINGS, findings=FINDINGS[1:], batch=BATCH, vae_batch=VAE_BATCH)
    facts |= dict(seed=SEED, precision=pick_precision("cpu")) | made
    named = facts | dict(findings=", ".join(FINDINGS[1:]))
    write_text(out / "README.md", CARD.format(**named))
    hashes = {
        p.relative_to(out).as_posix(): digest_file(p) for p in sorted(out.rglob("*.safetensors"))
    }
    write_json(out / "provenance.json", facts | dict(versions=library_versions(), weights=hashes))


def main():
    work = Path(sys.argv[1])
    vae_steps, steps = map(int, sys.argv[2:4]) if len(sys.argv) > 2 else (VAE_STEPS, STEPS)
    films, captions = all_drawings()
    pipe = untrained(work, films, sorted(set(captions)))
    error = train_autoencoder(pipe, films, work, vae_steps)
    print(f"autoencoder: {error:.2f} grey levels off", flush=True)
    train_unet(pipe, films, captions, work, steps)
    save(pipe, work / "small-xray", vae_steps=vae_steps, steps=steps, error=round(error, 2))
    print(
        json.dumps({p.name: p.stat().st_size for p in (work / "small-xray").rglob("*.safetensors")})
    )


if __name__ == "__main__":
    main()
