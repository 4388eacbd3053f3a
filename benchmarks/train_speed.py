"""Images per second of the trainer beside a bare forward-backward-step loop on tensors in memory.

Same pipeline, batch and precision; medians, taken in turn:
python benchmarks/train_speed.py [--batch 32] [--precision bf16] [--rounds 9] [--steps 3]
"""

import argparse, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np, torch
import torch.nn.functional as F
from cxr_synth.base.compute import autocast, pick_device, progress
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.dreambooth import TrainingTask, choose_weights, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.diffusion.small_pipeline import tiny_pipeline, to_device


def bare(pipe, cfg, device):
    "A step of the bare loop: all but forward, backward, clipping and AdamW was done before."
    side = pipe.unet.config.sample_size
    params = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if p.requires_grad]
    to_device(pipe.unet, device, cfg.mixed_precision).train()
    pipe.text_encoder.to(device)
    xt = torch.randn(cfg.train_batch_size, 4, side, side, device=device)
    noise = torch.randn(cfg.train_batch_size, 4, side, side, device=device)
    t = torch.randint(1000, (cfg.train_batch_size,), device=device)
    ids = pipe.tokenizer(
        [PROMPTS["normal"]], padding="max_length", return_tensors="pt"
    ).input_ids.to(device)
    with torch.no_grad():
        words = pipe.text_encoder(ids)[0]
    opt = torch.optim.AdamW(params, lr=1e-5, fused=True)

    def step():
        with autocast(device, cfg.mixed_precision):
            states = pipe.text_encoder(ids)[0] if cfg.train_text_encoder else words
            out = pipe.unet(xt, t, states.expand(len(xt), -1, -1)).sample
        F.mse_loss(out.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


def seconds(step, steps, device):
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def compare(base, root, trained, args):
    cfg = TrainConfig(
        train_text_encoder=trained,
        train_batch_size=args.batch,
        mixed_precision=args.precision,
        max_train_steps=10**6,
        ema_decay=None,
        checkpoint_steps=10**6,
    )
    device = pick_device(cfg.device)
    images = np.stack([draw_phantom(k, 0, 0, size=64) for k in range(2 * args.batch)])
    trainer = make_trainer(
        load_pipeline(base),
        TrainingTask(images, [PROMPTS["normal"]], np.zeros(len(images), int)),
        root / f"{trained}.pt",
        cfg,
    )
    plain = load_pipeline(base)
    choose_weights(plain, cfg)
    bar = progress(total=10**6 * args.batch)
    steps = dict(
        bare=bare(plain, cfg, device),
        ours=lambda: trainer.loop.take_step(trainer.losses, "speed", bar),
    )
    times = {name: [] for name in steps}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            times[name].append(seconds(step, args.steps, device))
    speed = {name: args.batch / median(t[1:]) for name, t in times.items()}
    print(
        (
            f"text encoder {'trained' if trained else 'frozen '}   bare {speed['bare']:6.1f} images/s "
            f"  ours {speed['ours']:6.1f} images/s   ratio {speed['ours'] / speed['bare']:.3f}"
        ),
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    args, root = parser.parse_args(), Path(tempfile.mkdtemp())
    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 64).save_pretrained(root / "base")
    print(f"batch {args.batch}, {args.precision}, {torch.get_num_threads()} threads")
    for trained in (False, True):
        compare(root / "base", root, trained, args)
