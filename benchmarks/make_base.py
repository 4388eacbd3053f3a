"""Train a small base on drawings, from which studies can start: --train.base WORK/small-xray.

    python benchmarks/make_base.py WORK [steps]

The drawings (`base_drawings.py`) show adults, other machines, and findings that no study here is about.
WORK gets the checkpoint, so that the same command goes on after a stop, previews and, at the end, the folder
`small-xray` in Stable Diffusion's format with float16 weights."""

import json
import sys
from pathlib import Path

import joblib
import numpy as np
import torch
from base_drawings import FINDINGS, draw
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from cxr_synth.base.files import digest_file, library_versions, write_json, write_text
from cxr_synth.base.settings import PROMPTS
from cxr_synth.diffusion.pipelines import save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_text_encoder, to_pixels, write_tokenizer
from cxr_synth.diffusion.trainer import LatentSet, Previews, Trainer
from cxr_synth.diffusion.wavelets import WaveletVAE, fit_latent_scales

SEED, SIZE, DRAWINGS = 0, 64, 16_000
STEPS, BATCH, PEAK = 1600, 64, 1e-3
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

Latents are the numbers of a lossless wavelet transform (`cxr_synth.diffusion.wavelets`), so diffusers
loads it where cxr_synth is installed.

Made by `benchmarks/make_base.py`: {steps:,} steps of {batch}, seed {seed}. Versions and the hash of each
file: `provenance.json`. Licence: Apache 2.0.
"""


def all_drawings() -> tuple[np.ndarray, list[str]]:
    "Films (N, 64, 64) and what is said of each."
    jobs = (joblib.delayed(draw)(k, SIZE, SEED) for k in range(DRAWINGS))
    made = joblib.Parallel(n_jobs=joblib.cpu_count() if DRAWINGS > 1000 else 1)(jobs)
    return np.stack([d.film for d in made]), [d.caption for d in made]


def small_unet() -> UNet2DConditionModel:
    "4.9 M weights on 8 x 8 places of 64 numbers; attention to the words below the first level."
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=64,
        out_channels=64,
        layers_per_block=1,
        block_out_channels=(96, 96, 96),
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
    vae = WaveletVAE()
    fit_latent_scales(vae, to_pixels(films[:4000]))
    noise = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,  # the average of a film is large: its last trace must go
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


def train(pipe, films: np.ndarray, captions: list[str], work: Path, steps: int):
    "All weights but the transform's, in place."
    prompts = sorted(set(captions))
    which = np.array([prompts.index(c) for c in captions])
    data = LatentSet(pipe.vae, films, prompts, which)
    about = dict(drawings=len(films), seed=SEED, batch=BATCH, peak=PEAK)
    # no Min-SNR weights: with velocities they would leave the outline, which is set at high noise, unlearnt
    how = dict(drop=0.1, warmup=100, ema_decay=0.998, seed=SEED, config=about)
    trainer = Trainer(pipe, data, work / "base.pt", steps, BATCH, PEAK, **how)
    trainer.loop.hooks.append(Previews(trainer, work / "previews", prompts[::40], 500, n=8))
    trainer.run("base")


def save(pipe, out: Path, steps: int):
    "Write it with float16 weights, its card, and what it was made from."
    for part in (pipe.unet, pipe.text_encoder):
        torch.nn.Module.to(part, torch.float16)
    save_pipeline(pipe, out)
    facts = dict(drawings=DRAWINGS, findings=FINDINGS[1:], steps=steps, batch=BATCH, seed=SEED)
    named = facts | dict(findings=", ".join(FINDINGS[1:]))
    write_text(out / "README.md", CARD.format(**named))
    hashes = {
        p.relative_to(out).as_posix(): digest_file(p) for p in sorted(out.rglob("*.safetensors"))
    }
    write_json(out / "provenance.json", facts | dict(versions=library_versions(), weights=hashes))


def main():
    work, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    films, captions = all_drawings()
    pipe = untrained(work, films, sorted(set(captions)))
    train(pipe, films, captions, work, steps)
    save(pipe, work / "small-xray", steps)
    print(
        json.dumps({p.name: p.stat().st_size for p in (work / "small-xray").rglob("*.safetensors")})
    )


if __name__ == "__main__":
    main()
