"""The alarm for copies: how often is a perfect generator accused, and which share of copies is found?

python benchmarks/copy_alarm.py alarm [STUDIES]        made-up studies: two classes, five perfect generators
    expected: an alarm in at most 5 % of studies at 20, 100 and 600 unseen films of up to three a patient
python benchmarks/copy_alarm.py quick [SETS]           made-up distances in place of films: seconds
python benchmarks/copy_alarm.py power [SETS]           sets of 500 images, 0, 1, 5 and 20 % of them copies
python benchmarks/copy_alarm.py real [SETS] [FOLDER]   kermany-224: held-out films as a perfect generator
"""

import sys
import time
from itertools import product
from pathlib import Path
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest

from cxr_synth.images.features import extract_features
from cxr_synth.images.images import prepare_image
from cxr_synth.protocol.dataset import parse_name
from cxr_synth.quality.copies import (
    DISGUISES,
    CopyTest,
    SearchSpace,
    count_pairs_once,
    feature_space,
    nearest_in_spaces,
    pixel_space,
)
from cxr_synth.quality.metrics import one_film_each
from cxr_synth.stats.intervals import holm

UNSEEN, SHARES = (20, 100, 600), (0, 0.01, 0.05, 0.2)
LATENT = 24  # numbers that make a made-up film


# -- made-up films


def made_up_spaces(rng):
    "Random projections in the place of networks, all fed by the same film."
    fall = 1 / np.sqrt(np.arange(1, LATENT + 1))

    def projection(width):
        matrix = rng.normal(size=(LATENT, width)) * fall[:, None]
        return lambda films: films @ matrix

    return {
        k: feature_space(projection(w)) for k, w in dict(features=16, layout=24, pixels=24).items()
    }


def draw_films(rng, count, most=3, alike=0.6):
    "Films (count, LATENT) of patients with one to `most` films each, and whose they are."
    who = np.repeat(np.arange(count), rng.integers(1, most + 1, count) if most > 1 else 1)[:count]
    own = rng.normal(size=(count, LATENT))[who]
    return np.sqrt(alike) * own + np.sqrt(1 - alike) * rng.normal(size=(count, LATENT)), who


def draw_set(rng, count, seen, share):
    "New patients, one film each, and a share of copies with a little noise."
    films, _ = draw_films(rng, count, 1)
    k = round(share * count)
    films[:k] = seen[rng.choice(len(seen), k)] + 0.1 * rng.normal(size=(k, LATENT))
    return films


def draw_distances(rng, patients, films=1, alike=0.6):
    "Six distances of each film that go together, and films of a patient that do."

    def normal(n):
        return 0.7 * (rng.normal(size=(n, 1)) + rng.normal(size=(n, 6)))

    x = np.repeat(normal(patients), films, axis=0) * alike**0.5
    x += normal(patients * films) * (1 - alike) ** 0.5
    columns = [f"{k}{s}" for k in ("features", "layout", "pixels") for s in ("", " ratio")]
    return pd.DataFrame(np.exp(0.2 * x - 0.5), columns=columns)


# -- rules


def among_seen(spaces, references, seen, who):
    "As the stage does: some of the seen patients among the others."
    mine = one_film_each(who)
    some = np.random.default_rng(0).permutation(mine)[: min(400, len(mine) // 2)]
    among = nearest_in_spaces(spaces, references, seen[some], apart=who[some][:, None] == who)
    return count_pairs_once(among, np.isin(who, who[some]))


def old_scores(null, *others):
    "The former scale: 0 at the median, -1 at the 5 % point of the unseen."
    columns = [c for c in null if not c.endswith("index")]
    logs = [np.log(x[columns] + 1e-6) for x in (null, *others)]
    middle, low = logs[0].median(), logs[0].quantile(0.05)
    return [((x - middle) / (middle - low).clip(lower=1e-6)).min(axis=1).to_numpy() for x in logs]


def former_rule(null, synthetic):
    "Wilson's lower limit of the share below the threshold is above the threshold's rate."
    a, b = old_scores(null, synthetic)
    rate = max(0.01, 1 / (len(a) + 1))
    hits = int((b < np.quantile(a, rate, method="weibull")).sum())
    return binomtest(hits, len(b)).proportion_ci(method="wilson").low > rate


def bootstrap_rule(null, who, synthetic, rng, draws=200, level=0.05):
    "Patients and synthetic images drawn with replacement: the share below the threshold is above its rate."
    a, b = old_scores(null, synthetic)
    rate, rows = max(0.01, 1 / (len(a) + 1)), [np.flatnonzero(who == w) for w in np.unique(who)]
    shares = []
    for _ in range(draws):
        drawn = np.concatenate([rows[k] for k in rng.integers(len(rows), size=len(rows))])
        limit = np.quantile(a[drawn], rate, method="weibull")
        shares.append((rng.choice(b, len(b)) < limit).mean())
    return np.quantile(shares, level) > rate


def compare(rng, null, who, among, synthetic, draws):
    "What each rule says of one class: alarm or p value."
    whole = pd.concat([null, among])
    patients = np.concatenate([who, len(null) + np.arange(len(among))])
    found = CopyTest(synthetic, whole, patients, draws)
    return dict(
        former=former_rule(null, synthetic),
        bootstrap=bootstrap_rule(null, who, synthetic, rng),
        films=CopyTest(synthetic, null, None, draws).p,
        unseen=CopyTest(synthetic, null, who, draws).p,
        all=found.p,
        new=found.n,
        least=found.least_share(),
    )


# -- tables


def alarm(studies=100, size=500, draws=299):
    "Studies of two classes and five perfect generators, each of which saw its own patients."
    for n in UNSEEN:
        start, former, families = time.perf_counter(), [], []
        for study in range(studies):
            rng = np.random.default_rng((n, study))
            said = []
            for _ in range(2):
                spaces, (films, who) = made_up_spaces(rng), draw_films(rng, n)
                for _ in range(5):
                    seen, whose = draw_films(rng, 300)
                    references = {k: s.reference(seen) for k, s in spaces.items()}
                    null, found = (
                        nearest_in_spaces(spaces, references, x)
                        for x in (films, draw_set(rng, size, seen, 0))
                    )
                    among = among_seen(spaces, references, seen, whose)
                    new = pd.concat([null, among])
                    patients = np.concatenate([who, n + np.arange(len(among))])
                    said.append((former_rule(null, found), CopyTest(found, new, patients, draws).p))
            former.append(np.mean([s[0] for s in said]))
            families.append([s[1] for s in said])
        ps = np.array(families)
        print(
            f"{n} unseen films: former rule, classes accused {np.mean(former):.1%}, studies "
            f"{np.mean(np.array(former) > 0):.1%}; test, classes with p <= 0.05 {(ps <= 0.05).mean():.1%}, "
            f"studies with an alarm {np.mean([min(holm(p)) <= 0.05 for p in ps]):.1%} of {studies} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


def rule_table(trials, head):
    "Shares of trials in which each rule gives the alarm, alone and as one of ten."
    t = pd.DataFrame(trials)
    tests = ", ".join(
        f"{k} {(t[k] <= 0.05).mean():.0%} (of ten {(t[k] <= 0.005).mean():.0%})"
        for k in ("films", "unseen", "all")
    )
    print(
        f"{head}: former {t.former.mean():.0%}, bootstrap {t.bootstrap.mean():.0%}, {tests}; "
        f"new patients {t.new.mean():.0f}, least share {t.least.mean():.1%}",
        flush=True,
    )


def power(sets=50, size=500, draws=399):
    for (n, count), share in product(((20, 300), (20, 1200), (100, 300), (600, 300)), SHARES):
        trials = []
        for k in range(sets):
            rng = np.random.default_rng((n, count, k, round(100 * share)))
            spaces, (films, who) = made_up_spaces(rng), draw_films(rng, n)
            seen, whose = draw_films(rng, count)
            references = {k: s.reference(seen) for k, s in spaces.items()}
            null, found = (
                nearest_in_spaces(spaces, references, x)
                for x in (films, draw_set(rng, size, seen, share))
            )
            among = among_seen(spaces, references, seen, whose)
            trials.append(compare(rng, null, who, among, found, draws))
        rule_table(trials, f"{n} unseen, {count} seen films, {share:.0%} copies")


def quick(sets=40, size=500, draws=199):
    "A class with three unseen films of a patient; copies are near in pixels."
    for patients, share in product((7, 33, 200), SHARES):
        said = []
        for k in range(sets if share == 0 else max(1, sets // 3)):
            rng = np.random.default_rng((patients, k))
            null, found = draw_distances(rng, patients, 3), draw_distances(rng, size)
            found.loc[: round(share * size) - 1, ["pixels", "pixels ratio"]] *= 0.05
            test = CopyTest(found, null, np.repeat(np.arange(patients), 3), draws)
            said.append((former_rule(null, found), test.p <= 0.05, test.p <= 0.005))
        former, alone, of_ten = np.mean(said, axis=0)
        print(
            f"{3 * patients} unseen films, {share:.0%} copies: former rule {former:.0%}, "
            f"test alone {alone:.0%}, as the first of ten {of_ten:.0%}; "
            f"{test.n} new patients, least share {test.least_share():.1%}",
            flush=True,
        )


# -- the real set


def stored_spaces(images, side=64):
    "The stage's three spaces, computed once: searched for by the index of an image."
    mirrored = np.ascontiguousarray(images[:, :, ::-1])

    def unit(x):
        return F.normalize(torch.as_tensor(x), dim=1)

    features = unit(extract_features(images, size=side))
    layouts = [
        unit(extract_features(x, "efficientnet-lite0-layout", size=side))
        for x in (images, mirrored)
    ]
    pixels = pixel_space()
    windows, centre = [*pixels.versions(images)], pixels.reference(images)

    def space(reference, versions):
        return SearchSpace(lambda at: reference[at], lambda at: (v[at] for v in versions))

    return dict(
        features=space(features, [features]),
        layout=space(layouts[0], layouts),
        pixels=space(centre, windows),
    )


def real(sets=40, folder="../shared/data/kermany-224", size=300, draws=399):
    for c in ("NORMAL", "PNEUMONIA"):
        files = sorted((Path(folder) / "train" / c).glob("*.jpeg"))
        who = np.unique([parse_name(p.stem)[1] for p in files], return_inverse=True)[1]
        films = np.stack([np.asarray(prepare_image(Image.open(p), 64)) for p in files])
        rng = np.random.default_rng(0)
        hidden = rng.permutation(len(films))[:450]  # images of copies, should these be seen
        copies = [[*DISGUISES.values()][k % 3](films[i], rng) for k, i in enumerate(hidden)]
        spaces = stored_spaces(np.concatenate([films, copies]))
        print(f"{c}: {len(films)} films of {who.max() + 1} patients", flush=True)
        for n, share in product(UNSEEN if c == "PNEUMONIA" else UNSEEN[:2], SHARES):
            trials = [
                real_trial(np.random.default_rng(k), spaces, who, hidden, n, size, share, draws)
                for k in range(sets)
            ]
            rule_table(trials, f"  {n} unseen films, {share:.0%} copies")


def real_trial(rng, spaces, who, hidden, n, size, share, draws):
    "A third of the patients seen; of the others some unseen films, and new patients for the set."
    order = rng.permutation(who.max() + 1)
    seen = np.flatnonzero(np.isin(who, order[: len(order) // 3]))
    rest = order[len(order) // 3 :]
    sizes = np.cumsum(np.bincount(who)[rest])
    cut = np.searchsorted(sizes, n) + 1
    unseen = np.flatnonzero(np.isin(who, rest[:cut]))[:n]
    fresh = rng.permutation(np.flatnonzero(np.isin(who, rest[cut:])))
    fresh = fresh[np.sort(np.unique(who[fresh], return_index=True)[1])]  # by films, one a patient
    k = round(share * size)
    planted = len(who) + rng.permutation(np.flatnonzero(np.isin(hidden, seen)))[:k]
    synthetic = np.concatenate([planted, fresh[: size - k]])
    references = {k: s.reference(seen) for k, s in spaces.items()}
    among = among_seen(spaces, references, np.arange(len(who))[seen], who[seen])
    null, found = (nearest_in_spaces(spaces, references, at) for at in (unseen, synthetic))
    return compare(rng, null, who[unseen], among, found, draws)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["alarm"]
    given = [int(rest[0])] + rest[1:] if rest else []
    dict(alarm=alarm, quick=quick, power=power, real=real)[what](*given)
