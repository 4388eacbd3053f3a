"""The quality stage: how long the whole of it takes on the real set, and two comparisons with pytorch-fid.

python benchmarks/quality.py suite [FOLDER]   2 x 1,200 images at 224 px against the real training classes
    FOLDER: kermany-224; expected: at most 240 s and 4 GiB on two cores, 20 s again
python benchmarks/quality.py copies [FOLDER]  1 % planted copies among unseen real images, at 224 px
    expected: at least 90 % found, about 1 % of the others flagged
python benchmarks/quality.py frechet          the Fréchet step at d = 2048, 1,200 images a side
    expected: at least 20 times faster
python benchmarks/quality.py fid              both classes through one stand-in network, 300 images a folder
    expected: at least 2 times faster
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr_synth.base.files import write_text
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, QualityConfig
from cxr_synth.images.features import extract_features
from cxr_synth.images.images import prepare_image
from cxr_synth.images.known_generators import write_class_images
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.images.study_images import load_images, training_rows
from cxr_synth.protocol.dataset import parse_name
from cxr_synth.quality.copies import (
    DISGUISES,
    CopyThreshold,
    feature_space,
    nearest_in_spaces,
    pixel_space,
    plant_copies,
    wilson,
)
from cxr_synth.quality.folders import calculate_fid
from cxr_synth.quality.metrics import frechet_distance, frechet_moments
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.quality import quality_table, stage_quality


def timed(f, *a, **k):
    start = time.perf_counter()
    return f(*a, **k), time.perf_counter() - start


def peak():  # GiB; not on Windows
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
        30 if sys.platform == "darwin" else 20
    )


def blurred_set(study, rows, n):
    "A synthetic set of real images, blurred: the time does not depend on what they show."
    folder, lines = study / "synthetic/real100-rep0", []
    for label in range(2):
        ids = rows.image_id[rows.label == label].tolist()
        images = load_images(study, [ids[k % len(ids)] for k in range(n)])
        moved = [np.roll(image, 7, axis=k % 2) for k, image in enumerate(images)]
        blurred = [gaussian_filter(image, 1 + k % 3) for k, image in enumerate(moved)]
        lines += write_class_images(folder, "real100-rep0", label, "truth", blurred)
    write_text(folder / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def suite(folder, n=1200):
    with tempfile.TemporaryDirectory() as tmp:
        study = Study(Path(tmp) / "study")
        stage_data(study, DataConfig(source=str(folder), resolution=224))
        rows = training_rows(study, 1.0, 0)
        blurred_set(study, rows, n)
        cfg = QualityConfig(size=224)
        _, first = timed(stage_quality, study, cfg)
        memory = peak()
        os.rename(study / "quality", study / "before")  # only the cache is left
        _, second = timed(stage_quality, study, cfg)
        _, third = timed(stage_quality, study, cfg)
        print(
            f"suite: {first:.0f} s, peak {memory:.1f} GiB; again from the cache {second:.1f} s; "
            f"again when complete {third:.1f} s   threads {torch.get_num_threads()}, "
            f"{len(rows)} real training images, {len(quality_table(study))} numbers"
        )


def search_spaces(side):
    "The three spaces of the search, as the stage has them."

    def embed(images):
        return extract_features(images, size=side)

    def embed_layout(images):
        return extract_features(images, "efficientnet-lite0-layout", size=128)

    return dict(
        features=feature_space(embed),
        layout=feature_space(embed_layout, flip=True),
        pixels=pixel_space(),
    )


def read_parts(folder, side):
    "Images and patients of three sets of patients: seen, unseen (for the threshold), fresh."
    files = sorted(Path(folder).glob("*.jpeg"))
    patients = np.array([parse_name(p.stem)[1] for p in files])
    for part in np.array_split(np.random.default_rng(0).permutation(np.unique(patients)), 3):
        chosen = np.flatnonzero(np.isin(patients, part))
        images = [np.asarray(prepare_image(Image.open(files[k]), side)) for k in chosen]
        yield np.stack(images), patients[chosen]


def copies(folder, side=224):
    "The synthetic set: the fresh images, and 1 % disguised copies of the seen ones."
    spaces = search_spaces(side)
    for c in ("NORMAL", "PNEUMONIA"):
        (seen, _), (unseen, patients), (fresh, _) = read_parts(Path(folder) / "train" / c, side)
        references = {k: s.reference(seen) for k, s in spaces.items()}
        test = CopyThreshold(nearest_in_spaces(spaces, references, unseen), patients)
        planted, disguise = plant_copies(seen, each=max(20, len(fresh) // 100))
        caught = test.flags(nearest_in_spaces(spaces, references, planted))
        scores = test.score(nearest_in_spaces(spaces, references, fresh))
        k, n = int((scores < test.threshold).sum()), len(fresh)
        by_disguise = ", ".join(f"{d} {caught[disguise == d].mean():.0%}" for d in DISGUISES)
        low, high = wilson(k, n)
        least, most = ((scores < threshold).mean() for threshold in test.interval)
        print(
            f"copies, {c}: found {caught.mean():.0%} of {len(planted)} ({by_disguise}); "
            f"fresh images flagged {k} of {n}, 95 % {low:.2%} to {high:.2%}; "
            f"at both ends of the threshold's interval {least:.2%} and {most:.2%}"
        )


def frechet(n=1200, d=2048):
    from pytorch_fid.fid_score import calculate_frechet_distance

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, d)) * np.sqrt(1 / np.arange(1, d + 1)) + s for s in (0, 0.05))
    moments = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    (mine, t), (_, t2) = timed(frechet_distance, x, y), timed(frechet_moments, *moments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want, t1 = timed(calculate_frechet_distance, *moments)
        except TypeError as e:
            print(
                f"frechet: {t:.2f} s (eigen-decomposition {t2:.2f} s); "
                f"pytorch-fid does not work with this scipy: {e}"
            )
            return
    print(
        f"frechet d = {d}, n = {n}: pytorch-fid {t1:.2f} s, eigen-decomposition {t2:.2f} s, "
        f"here {t:.2f} s ({t1 / t:.0f} times faster); relative difference {abs(mine / want - 1):.1e}"
    )


class StandIn(torch.nn.Module):
    "A small network with 2,048 outputs in Inception's place."

    def __init__(self, *_):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 7, 4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(64, 2048, 3, 4),
            torch.nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x):
        return [self.net(x)]


def fid(n=300):
    from pytorch_fid import fid_score

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as tmp:
        for label, c in enumerate(("normal", "pneumonia")):
            for s, side in enumerate(("real", "synthetic")):
                (Path(tmp) / side / c).mkdir(parents=True)
                for k in range(n):
                    Image.fromarray(draw_phantom(10_000 * s + k, 0, label, size=128)).save(
                        Path(tmp) / side / c / f"{k:05d}.png"
                    )
        pairs = [(f"{tmp}/real/{c}", f"{tmp}/synthetic/{c}") for c in ("normal", "pneumonia")]
        net = StandIn().eval()

        def ours():
            return [calculate_fid(*p, model=net, cache=Path(tmp) / "cache") for p in pairs]

        mine, t = timed(ours)
        _, again = timed(ours)

        def theirs():
            stats = [
                [fid_score.compute_statistics_of_path(p, net, 50, 2048, "cpu", 0) for p in pair]
                for pair in pairs
            ]
            return [fid_score.calculate_frechet_distance(*a, *b) for a, b in stats]

        try:
            want, t1 = timed(theirs)
        except TypeError as e:
            return print(f"fid: {t:.1f} s; pytorch-fid does not work with this scipy: {e}")
        print(
            f"fid, 2 classes of {n} + {n}: pytorch-fid {t1:.1f} s, here {t:.1f} s "
            f"({t1 / t:.1f} times faster), again {again:.1f} s; "
            f"relative difference {max(abs(a / b - 1) for a, b in zip(mine, want)):.1e}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="frechet", choices=["suite", "copies", "frechet", "fid"]
    )
    parser.add_argument("folder", nargs="?", default="../shared/data/kermany-224")
    args = parser.parse_args()
    if args.what in ("suite", "copies"):
        dict(suite=suite, copies=copies)[args.what](args.folder)
    else:
        dict(frechet=frechet, fid=fid)[args.what]()
