"""Does the interval keep its promise? 20,000 studies by the linear model in six scenarios, the
crossed bootstrap beside it, and 500 studies with simulated scores. Minutes on one core.
"""

import argparse, time
import numpy as np
from cxr_synth.base.compute import seed_for
from cxr_synth.stats.intervals import RunScores, auroc_difference
from cxr_synth.stats.simulate import (
    INTERVAL_METHODS,
    SCENARIOS,
    linear_coverage,
    make_patients,
    separation_for,
    simulate,
)
from scipy import stats


def scored(n, K=3, S=4, sd_rep=0.08, sd_seed=0.04):
    "One study with simulated scores: does the interval hold the truth, and does it lie above it?"
    rng = np.random.default_rng(seed_for("benchmark", n))
    patients, labels = make_patients(120, rng)
    p = simulate(patients, labels, dict(real=0.85, mixed=0.87), K, S, rng, sd_rep, sd_seed)
    a, b = (
        RunScores(
            np.arange(len(labels)),
            patients,
            labels,
            p[x],
            [(k, s) for k in range(K) for s in range(S)],
        )
        for x in ("mixed", "real")
    )
    iv = auroc_difference(a, b, 500, seed=n)

    def auc(x, sd2=0):
        return 100 * stats.norm.cdf(separation_for(x) / np.sqrt(2 + sd2))

    true = auc(0.87, sd_rep**2 + sd_seed**2) - auc(0.85)
    return iv["low"] <= true <= iv["high"], iv["low"] > true


def main():
    arg = argparse.ArgumentParser(description=__doc__)
    arg.add_argument("--studies", type=int, default=20_000)
    arg.add_argument("--scored", type=int, default=500)
    arg = arg.parse_args()
    start = time.perf_counter()
    kept = True
    print(
        "coverage % (false 'improves' %)".ljust(32) + "".join(m.ljust(22) for m in INTERVAL_METHODS)
    )
    for sc in SCENARIOS:
        found = linear_coverage(sc, arg.studies)
        covered, false = found["t, three sources"]
        kept &= covered >= 91.5 and false <= 4.5
        print(
            str(sc).ljust(32) + "".join(f"{c:.2f} ({f:.2f})".ljust(22) for c, f in found.values()),
            flush=True,
        )
    held, above = np.mean([scored(n) for n in range(arg.scored)], axis=0)
    print(f"{arg.scored} studies with simulated scores, 3x4: {100 * held:.1f} ({100 * above:.1f})")
    print(f"{time.perf_counter() - start:.0f} s; limits 91.5 and 4.5 kept in all six: {kept}")
    raise SystemExit(not kept)


if __name__ == "__main__":
    main()
