"""Training steps of the small U-Net by how long waiting threads spin: quiet, and beside a busy loop.

    python benchmarks/busy.py [rounds] [seconds a measurement]

GOMP_SPINCOUNT says how often a waiting thread looks before it sleeps; without a number libgomp spins
for long where the machine seems to have a core for each. Settings take turns, so that a drift of the
machine meets them alike."""

import os
import subprocess
import sys
from statistics import median

STEPS = """
import sys, time
import torch
from cxr_synth.diffusion.small_pipeline import tiny_unet
unet = tiny_unet(16)
x, t, words = torch.randn(32, 4, 16, 16), torch.randint(0, 1000, (32,)), torch.randn(32, 32, 64)
def step():
    unet(x, t, words).sample.square().mean().backward()
    unet.zero_grad()
step()
start, n = time.perf_counter(), 0
while time.perf_counter() - start < float(sys.argv[1]):
    step()
    n += 32
print(n / (time.perf_counter() - start))
"""
SETTINGS = {
    "spin for ever": dict(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="INFINITY"),
    "torch's default": {},
    "ours": None,  # what the package sets
    "100,000": dict(GOMP_SPINCOUNT="100000"),
    "10,000": dict(GOMP_SPINCOUNT="10000"),
    "1,000": dict(GOMP_SPINCOUNT="1000"),
    "0": dict(GOMP_SPINCOUNT="0"),
}


def images_per_second(extra: dict | None, seconds: float) -> float:
    "One process with these settings; an empty value keeps the package from setting its own."
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= dict(OMP_NUM_THREADS=str(os.cpu_count()))
    code = STEPS
    if extra is not None:
        env |= extra
        code = "import torch" + code  # loaded before the package: its settings come too late
    done = subprocess.run(
        [sys.executable, "-c", code, str(seconds)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


def measure(rounds: int, seconds: float) -> dict:
    "Medians of images/s."
    rates = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, extra in SETTINGS.items():
            rates[name].append(images_per_second(extra, seconds))
    return {name: median(found) for name, found in rates.items()}


def main():
    rounds, seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 5, 6.0
    if len(sys.argv) > 2:
        seconds = float(sys.argv[2])
    quiet = measure(rounds, seconds)
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        busy = measure(rounds, seconds)
    finally:
        loop.kill()
    print("spinning            quiet images/s   beside a busy loop")
    for name in SETTINGS:
        print(f"{name:18} {quiet[name]:10.1f} {busy[name]:18.1f}")


if __name__ == "__main__":
    main()
