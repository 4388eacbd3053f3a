"""The guide's loader against batches from the pixel cache, and the training loop against a bare one.
--folder: class folders of original images.
"""

import argparse, os, statistics, tempfile, time
from pathlib import Path

os.environ["CXR_QUIET"] = "1"
import numpy as np, torch
from torch.utils.data import DataLoader
from cxr_synth.base.settings import ExperimentsConfig
from cxr_synth.guide import ChestXrayDataset, get_transforms
from cxr_synth.images.images import pixel_cache
from cxr_synth.classify.finetune import Classifier, FinetuneStep, finetune, strata_by_class


def best(f, repeats):
    "Median seconds."
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        out.append(time.perf_counter() - start)
    return statistics.median(out)


def loaders(args):
    "Images a second of both loaders."
    dirs = {
        c: next(p for p in Path(args.folder).iterdir() if p.name.lower() == c)
        for c in ("normal", "pneumonia")
    }
    theirs = ChestXrayDataset(real_dirs=dirs, transform=get_transforms(True))
    loader = DataLoader(theirs, batch_size=20, shuffle=True, num_workers=0)
    a = len(theirs) / best(lambda: [None for _ in loader], 3)
    paths, y = [Path(s[0]) for s in theirs.samples], np.array([s[1] for s in theirs.samples])
    with tempfile.TemporaryDirectory() as d:
        names = [f"{p.parent.name}/{p.name}" for p in paths]
        cache = pixel_cache(d, names, paths, args.size)
        x = cache[names]
        work = FinetuneStep(
            torch.nn.Identity(),
            [strata_by_class(x, y, 1.0)],
            ExperimentsConfig(method="finetune", size=args.size, batch_size=64),
            100,
            "cpu",
            "gentle",
            0,
        )
        b = 64 * 20 / best(lambda: [work.batch(k) for k in range(20)], 3)
        cache.close()
    print(
        f"loader, images/s: guide {a:.0f}, ours {b:.0f} at {args.size} px, ratio {b / a:.1f} "
        "(expected: at least 20)"
    )


def loops(args):
    "Steps a second of both loops."
    cfg = ExperimentsConfig(
        method="finetune",
        network=args.network,
        size=64,
        batch_size=16,
        steps=args.steps,
        pretrained=False,
        warmup=2,
        checkpoint_steps=10**6,
    )
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (256, 64, 64), np.uint8), np.arange(256) % 2
    model = Classifier(cfg.network, 64, False).to(memory_format=torch.channels_last).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    fixed = torch.rand(16, 1, 64, 64).contiguous(memory_format=torch.channels_last)
    target = torch.ones(16)

    def bare():
        for _ in range(args.steps):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(fixed), target)
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)

    def ours(steps):
        with tempfile.TemporaryDirectory() as d:
            finetune(
                [strata_by_class(x, y, 1.0)], cfg, "cpu", Path(d) / "checkpoint.pt", 0, steps=steps
            )

    bare()
    ours(2)  # warm up

    def once():
        a = best(bare, 1)
        short = best(lambda: ours(args.steps), 1)
        long = best(lambda: ours(2 * args.steps), 1)
        return a / (
            long - short
        )  # the same number of steps, without building and saving the network

    pairs = [once() for _ in range(args.repeats)]
    print(
        f"loop, {args.network} at 64 px, batch 16: bare/ours {statistics.median(pairs):.2f} "
        f"({min(pairs):.2f} to {max(pairs):.2f}), median of {args.repeats} rounds (expected: at "
        "least 0.9)"
    )


p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--folder")
p.add_argument("--size", type=int, default=64)
p.add_argument("--network", default="densenet121")
p.add_argument("--steps", type=int, default=30)
p.add_argument("--repeats", type=int, default=5)
args = p.parse_args()
if args.folder:
    loaders(args)
loops(args)
