"Training step of the small U-Net on a CPU: plain attention against PyTorch's fused one; medians, in turn."

import time
from statistics import median

import torch
from cxr_synth.diffusion.small_pipeline import tiny_unet, to_device


def seconds(unet, x, t, words, precision):
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = unet(x, t, words).sample.float().square().mean()
    loss.backward()
    unet.zero_grad()
    return time.perf_counter() - start


x = torch.randn(64, 4, 16, 16)
t = torch.randint(0, 1000, (64,))
words = torch.randn(64, 32, 64)
for precision in ("no", "bf16"):
    networks = dict(fused=tiny_unet(16), plain=to_device(tiny_unet(16), "cpu", "bf16"))
    times = {name: [] for name in networks}
    for _ in range(7):
        for name, unet in networks.items():
            times[name].append(seconds(unet, x, t, words, precision))
    fused, plain = (median(times[n][1:]) for n in ("fused", "plain"))
    print(
        f"{precision:4}  fused {64 / fused:5.0f} images/s   plain {64 / plain:5.0f} images/s   "
        f"ratio {fused / plain:.2f}   threads {torch.get_num_threads()}"
    )
