"""What `import cxr_synth` and `cxr-synth --help` cost beside a bare Python: medians of several fresh
processes.
"""

import argparse, shutil, statistics, subprocess, sys, sysconfig, time


def seconds(command, runs):
    "Wall-clock seconds of each of `runs` processes; one more before them, untimed, fills the disk cache."
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times[1:]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--runs", type=int, default=9, help="timed processes of each command")
runs = parser.parse_args().runs
script = shutil.which("cxr-synth", path=sysconfig.get_path("scripts"))
if script is None:
    sys.exit("cxr-synth is not installed for this Python: run `python -m pip install -e .` first.")
commands = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import cxr_synth": [sys.executable, "-c", "import cxr_synth"],
    "cxr-synth --help": [script, "--help"],
}
base = None
print(f"{'command':<18} {'median s':>9} {'fastest s':>10} {'ratio':>6}   ({runs} runs)")
for name, command in commands.items():
    times = seconds(command, runs)
    median = statistics.median(times)
    base = base or median
    print(f"{name:<18} {median:9.3f} {min(times):10.3f} {median / base:6.1f}")
