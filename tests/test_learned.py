"""Has a generator learned? The rule on images whose worth is known: fog, noise, one picture, good ones."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cxr_synth.images.chest_gate import film_numbers, learn_chest
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.quality.measure import fit_head
from cxr_synth.quality.metrics import density_coverage
from cxr_synth.report.learned import FAILINGS, judge_learning, learned_sentence
from cxr_synth.stats.auc import auroc


def films(first, n, label):
    return np.stack([draw_phantom(first + k, 0, label, size=64) for k in range(n)])


def seen(images):
    "Small pictures with their structure: features that need no network."
    return np.concatenate(film_numbers(images), 1)


REAL = [films(1000 * (label + 1), 90, label) for label in (0, 1)]
NEW = [films(1000 * (label + 5), 60, label) for label in (0, 1)]
RNG = np.random.default_rng(0)


def noise():
    return RNG.integers(0, 256, (60, 64, 64)).astype(np.uint8)


def fog():
    x = np.stack([gaussian_filter(x.astype(float), 8) for x in noise()])
    return (128 + 60 * (x - 127.5) / x.std()).clip(0, 255).astype(np.uint8)


SETS = {
    "fog": lambda: [fog(), fog()],
    "noise": lambda: [noise(), noise()],
    "collapsed": lambda: [x[:1].repeat(60, 0) for x in NEW],
    "good": lambda: NEW,
    "without classes": lambda: [np.concatenate([NEW[0][k::2], NEW[1][k::2]]) for k in (0, 1)],
}


def rows_of(sets):
    "What the quality stage measures of two classes, by its own functions but for MS-SSIM."
    labels, head = np.repeat([0, 1], [60, 60]), np.concatenate([x[:60] for x in REAL])
    ask = fit_head(seen(head), labels)
    said = ask(seen(np.concatenate(sets)))
    halves = [RNG.permutation(120)[:60] for _ in range(20)]
    draws = [auroc(labels[h], said[h]) for h in halves]
    about = dict(metric="label-auroc", reference="val", low=min(draws), high=max(draws))
    held = auroc(np.repeat([0, 1], 30), ask(seen(np.concatenate([x[60:] for x in REAL]))))
    rows = [about | dict(value=auroc(labels, said), floor=held)]
    for real, made, other in zip(REAL, sets, NEW):
        found, floor = (density_coverage(seen(real), seen(x))[1] for x in (made, other))
        rows.append(dict(metric="coverage", reference="train", value=found, floor=floor))
        alike = np.corrcoef(made.reshape(len(made), -1).astype(float)).mean()
        normal = np.corrcoef(other.reshape(len(other), -1).astype(float)).mean()
        rows.append(dict(metric="ms-ssim", reference=None, value=alike, floor_high=normal))
    return rows


@pytest.mark.parametrize(
    "name, verdict",
    [
        ("fog", "no chests"),
        ("noise", "no chests"),
        ("collapsed", "one picture"),
        ("good", "learned"),
        ("without classes", "no classes"),
    ],
)
def test_known_sets(name, verdict):
    sets = SETS[name]()
    gate = learn_chest(
        np.concatenate([x[:30] for x in REAL]), np.concatenate([x[30:] for x in REAL])
    )
    marked = float(gate.marks(np.concatenate(sets)).mean())
    found = judge_learning("g", rows_of(sets), marked)
    assert found.verdict == verdict, found
    said = learned_sentence([found])
    assert said == "" if verdict == "learned" else FAILINGS[verdict] in said


def test_unmeasured_is_unknown():
    assert judge_learning("g", [], None).verdict == "unknown"
    assert learned_sentence([judge_learning("g", [], None)]) == ""
