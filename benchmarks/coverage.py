"""Does the interval keep its promise, and are the words true? 20,000 studies by the linear model in
each scenario, the crossed bootstrap beside it; then made-up studies through the whole analysis.

python benchmarks/coverage.py [--studies 20000] [--whole 500] [--kinds KIND ...]     a minute; and
about ten on one core for 500 studies of each kind
"""

import argparse, os, time

os.environ.setdefault("CXR_QUIET", "1")
from cxr_synth.report.coverage import (
    COPY_KINDS,
    FAILING_KINDS,
    NO_WORD_KINDS,
    STUDY_KINDS,
    word_rates,
)
from cxr_synth.stats.simulate import INTERVAL_METHODS, SCENARIOS, linear_coverage

LEAST_COVERAGE, MOST_FALSE = 91.5, 4.0  # %, of kinds that the plan allows a word for


def linear(studies):
    "Print the coverage of the formula; is it kept?"
    head = "coverage % (false 'improves' %)"
    print(head.ljust(32) + "".join(m.ljust(22) for m in INTERVAL_METHODS))
    kept = True
    for sc in SCENARIOS:
        found = linear_coverage(sc, studies)
        covered, false = found["t, three sources"]
        kept &= covered >= LEAST_COVERAGE and false <= 4.5
        cells = (f"{c:.2f} ({f:.2f})".ljust(22) for c, f in found.values())
        print(str(sc).ljust(32) + "".join(cells), flush=True)
    return kept


def counted(rate, studies):
    "Two standard errors of a rate in %, counted on so many studies."
    return 200 * (rate / 100 * (1 - rate / 100) / studies) ** 0.5


def whole(studies, wanted):
    "Print the words of studies that went through the whole analysis; are they as they must be?"
    kept = True
    for kinds in (STUDY_KINDS, NO_WORD_KINDS, COPY_KINDS, FAILING_KINDS):
        for kind in kinds:
            if wanted and not any(w in kind.name for w in wanted):
                continue
            few = kinds is NO_WORD_KINDS  # what may never have a word needs no precision
            found = word_rates(kind, max(1, studies // 5) if few else studies)
            covered = "-" if found["coverage"] is None else f"{found['coverage']:.1f}"
            rates = "".join(f"{found[w]:10.1f}" for w in ("improves", "worsens", "no word"))
            print(f"{kind.name:32}{covered:>8}{rates}", flush=True)
            if kinds is STUDY_KINDS:
                kept &= found["coverage"] >= LEAST_COVERAGE - counted(found["coverage"], studies)
                kept &= found["improves"] <= MOST_FALSE + counted(MOST_FALSE, studies)
            elif kinds is NO_WORD_KINDS:
                kept &= found["improves"] + found["worsens"] == 0
    return kept


def main():
    arg = argparse.ArgumentParser(description=__doc__)
    arg.add_argument("--studies", type=int, default=20_000, help="by the linear model; 0: none")
    arg.add_argument("--whole", type=int, default=500, help="through the whole analysis; 0: none")
    arg.add_argument("--kinds", nargs="*", default=[], help="parts of names of kinds")
    arg = arg.parse_args()
    start = time.perf_counter()
    kept = linear(arg.studies) if arg.studies else True
    if arg.whole:
        head = "".join(w.rjust(10) for w in ("improves", "worsens", "no word"))
        print(f"{f'{arg.whole} whole studies, %':32}{'coverage':>8}{head}")
        kept &= whole(arg.whole, arg.kinds)
    print(f"{time.perf_counter() - start:.0f} s; limits kept: {bool(kept)}")
    raise SystemExit(not kept)


if __name__ == "__main__":
    main()
