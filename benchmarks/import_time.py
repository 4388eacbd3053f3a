"""What starting costs: seconds and peak memory (RSS) of fresh processes, and how soon a worker is ready.

python benchmarks/import_time.py [--runs 5]     medians; an untimed process before them fills the cache
CPU seconds hardly change on a busy machine; wall-clock seconds do.
"""

import argparse, os, shutil, statistics, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path

WORKER = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from cxr_synth.base.settings import ExperimentsConfig
from cxr_synth.classify.executors import Job
with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
    start = time.perf_counter()
    pool.submit(Job, ".", "{}", ExperimentsConfig(), "cpu", 1).result()
    print(time.perf_counter() - start)
"""
HEAVY = "diffusers", "transformers", "peft", "torchvision", "torch"


def measure(command):
    "Wall-clock seconds, CPU seconds and peak MiB of one process."
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def worker_ready():
    "Seconds until a spawned worker has its modules and gives its first answer."
    done = subprocess.run(
        [sys.executable, "-c", WORKER], check=True, capture_output=True, text=True
    )
    return float(done.stdout), float("nan"), float("nan")


def loaded(module):
    "Which heavy libraries a module's import brings."
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return ", ".join(done.stdout.split()) or "none"


def commands(script, study):
    "Name -> command."
    python = [sys.executable, "-c"]
    return {
        "python -c pass": [*python, "pass"],
        "import cxr_synth": [*python, "import cxr_synth"],
        "cxr-synth --help": [script, "--help"],
        "cxr-synth status": [script, "status", str(study)],
        "import stages.plan": [*python, "import cxr_synth.stages.plan"],
        "import a worker's modules": [*python, "import cxr_synth.classify.executors"],
    }


def report(name, measured, runs):
    found = [measured() for _ in range(runs + 1)][1:]
    seconds, cpu, mib = (statistics.median(values) for values in zip(*found))
    fastest = min(values[0] for values in found)
    print(f"{name:<26} {seconds:9.2f} {fastest:10.2f} {cpu:9.2f} {mib:9.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="timed processes of each command")
    runs = parser.parse_args().runs
    script = shutil.which("cxr-synth", path=sysconfig.get_path("scripts"))
    if script is None:
        sys.exit("cxr-synth is not installed for this Python: run `pip install -e .` first.")
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        flags = ["--data", "phantom", "--data.patients", "120", "--data.resolution", "32"]
        subprocess.run([script, "data", str(study), *flags], check=True, capture_output=True)
        print(
            f"{'':<26} {'median s':>9} {'fastest s':>10} {'CPU s':>9} {'peak MiB':>9}   ({runs} runs)"
        )
        for name, command in commands(script, study).items():
            report(name, lambda c=command: measure(c), runs)
        report("spawned worker ready", worker_ready, runs)
    for module in ("cxr_synth.stages.plan", "cxr_synth.classify.executors"):
        print(f"{module} loads of the heavy libraries: {loaded(module)}")


if __name__ == "__main__":
    main()
