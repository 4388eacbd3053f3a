"The trainer learns what a plain loop does: the same items, the same losses to 1e-4 over 20 steps in float32."

import math

import numpy as np, pytest, torch
import torch.nn.functional as F
from cxr_synth.base.compute import seed_for
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.dreambooth import TrainingTask, choose_weights, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

STEPS = 20
BATCH = 4
PEAK = 1e-3
WARMUP = 5
SEED = 3
CASES = {
    "full": dict(train_text_encoder=False),
    "text": dict(train_text_encoder=True),
    "prior": dict(train_text_encoder=True, prior_loss_weight=0.7, snr_gamma=5.0),
    "lora": dict(method="lora", rank=4, lora_alpha=8, train_text_encoder=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def images():
    return np.stack([draw_phantom(k, 0, k % 2, size=32) for k in range(24)])


# Stable Diffusion's schedule, written out
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def rate(step):
    "Linear warm-up, then half a cosine."
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def item_loss(pipe, image, prompt, g, gamma):
    "Loss of one item; its random numbers come from `g` in the trainer's order."
    pixels = torch.from_numpy(image).float() / 127.5 - 1
    with torch.no_grad():
        q = pipe.vae.encode(pixels.expand(1, 3, -1, -1)).latent_dist
    x0 = q.mean + q.std * torch.randn(q.mean.shape[1:], generator=g)
    x0 = x0 * pipe.vae.config.scaling_factor
    noise = torch.randn(x0.shape[1:], generator=g)[None]
    t = torch.randint(1000, (), generator=g)
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(
        prompt, padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    words = pipe.text_encoder(ids)[0]
    mixed = ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * noise
    loss = F.mse_loss(pipe.unet(mixed, t, words).sample, noise)
    snr = ABAR[t] / (1 - ABAR[t])
    return loss * min(snr, gamma) / snr if gamma else loss


def batch_loss(pipe, what, images, prompt, step, gamma):
    "Mean loss of the items at the positions of one step."
    total = 0
    for position in range(step * BATCH, (step + 1) * BATCH):
        epoch, i = divmod(position, len(images))
        order = np.random.default_rng(seed_for(SEED, what, "epoch", epoch)).permutation(len(images))
        g = torch.Generator().manual_seed(seed_for(SEED, what, "item", position))
        total = total + item_loss(pipe, images[order[i]], prompt, g, gamma)
    return total / BATCH


def reference(pipe, images, prior, gamma, weight):
    "A plain loop: no caches, both halves apart, AdamW and the schedule as PyTorch has them."
    params = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(params, lr=PEAK, weight_decay=1e-2, fused=False, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    seen = []
    for step in range(STEPS):
        loss = batch_loss(pipe, "instance", images, PROMPTS["normal"], step, gamma)
        total = loss
        if prior is not None:
            total = loss + weight * batch_loss(
                pipe, "prior", prior, PROMPTS["pneumonia"], step, gamma
            )
        total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("case", CASES)
def test_same_learning(case, base, images, tmp_path):
    cfg = TrainConfig(
        **dict(
            max_train_steps=STEPS,
            train_batch_size=BATCH,
            learning_rate=PEAK,
            lr_warmup_steps=WARMUP,
            ema_decay=None,
            mixed_precision="no",
            device="cpu",
        )
        | CASES[case]
    )
    prior = images[1::2] if cfg.prior_loss_weight else None
    kept = None if prior is None else (prior, PROMPTS["pneumonia"])
    task = TrainingTask(images[::2], [PROMPTS["normal"]], np.zeros(12, int), kept)
    log = make_trainer(load_pipeline(base), task, tmp_path / "a.pt", cfg, SEED).run()
    ours = [row["loss"] for row in log]
    plain = load_pipeline(base)
    choose_weights(plain, cfg, SEED)
    theirs = reference(plain, images[::2], prior, cfg.snr_gamma, cfg.prior_loss_weight)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(set(ours)) == STEPS and ours[-1] != ours[0]


def test_the_reference_can_fail(base, images, tmp_path):
    "Another seed gives other losses, by far more than the tolerance."
    cfg = TrainConfig(max_train_steps=2, train_batch_size=BATCH, mixed_precision="no", device="cpu")
    task = TrainingTask(images[::2], [PROMPTS["normal"]], np.zeros(12, int))
    first = []
    for seed in (1, 2):
        trainer = make_trainer(load_pipeline(base), task, tmp_path / f"{seed}.pt", cfg, seed)
        first.append(trainer.run()[0]["loss"])
    assert abs(first[0] - first[1]) / first[0] > 1e-3
