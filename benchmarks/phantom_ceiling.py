"""How good can one be at telling ill phantoms from healthy ones? A small network and a Hotelling
template, both taught by thousands of phantoms.

After Zhou, Li & Anastasio (IEEE TMI 2019): where the ideal observer has no formula, a network
trained on endless simulated images approximates it from below.

    python benchmarks/phantom_ceiling.py [--strengths A B ...] [--patients N] [--epochs N]

Without --strengths: the preset's own range. Strength 0 must give 0.5.

"""

import argparse, time

import joblib, numpy as np, torch
from cxr_synth.images.phantom import STUDY_PHANTOM, draw_phantom, hotelling
from sklearn.metrics import roc_auc_score
from torch import nn


def image(k, strength):
    return draw_phantom(k, 0, k % 2, STUDY_PHANTOM["size"], seed=77, strength=strength)


def network():
    "Four convolutions; no image of 32 px needs more."

    def block(a, b):
        return nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
        )

    return nn.Sequential(
        block(1, 16),
        nn.MaxPool2d(2),
        block(16, 32),
        nn.MaxPool2d(2),
        block(32, 64),
        nn.MaxPool2d(2),
        block(64, 96),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 96, 1),
    )


def train(net, x, y, epochs, batch=64):
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * (len(x) // batch))
    for _ in range(epochs):
        for i in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = nn.functional.binary_cross_entropy_with_logits(net(x[i])[:, 0], y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            plan.step()
    return net.eval()


def judge(strength, n, epochs):
    "AUROC of both observers on 2,000 new patients."
    start = time.time()
    torch.manual_seed(0)
    films = np.stack(
        joblib.Parallel(n_jobs=-1, batch_size=200)(
            joblib.delayed(image)(k, strength) for k in range(n + 2000)
        )
    )
    y = np.arange(len(films)) % 2
    x = torch.from_numpy(films).float()[:, None] / 128 - 1
    x = nn.functional.avg_pool2d(x, x.shape[-1] // 32)
    pixels = nn.functional.avg_pool2d(x, 2).flatten(1).numpy() * 128
    template = hotelling(pixels[:n][y[:n] == 0], pixels[:n][y[:n] == 1])
    net = train(network(), x[:n], torch.from_numpy(y[:n]).float(), epochs)
    with torch.inference_mode():
        scores = net(x[n:])[:, 0]
    print(
        (
            f"strength {strength}: network {roc_auc_score(y[n:], scores):.3f}, Hotelling "
            f"{roc_auc_score(y[n:], pixels[n:] @ template):.3f}; {time.time() - start:.0f} s"
        ),
        flush=True,
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--patients", type=int, default=16000)
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--strengths", type=float, nargs="*", default=[STUDY_PHANTOM["strength"]])
    args = p.parse_args()
    for s in args.strengths:
        judge(s, args.patients, args.epochs)
