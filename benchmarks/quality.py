"""The quality suite: how long the whole of it takes on the real set, and two comparisons with
pytorch-fid.
python benchmarks/quality.py suite [FOLDER]   2 x 1,200 images at 224 px against the real training
classes; FOLDER: kermany-224; expected: at most 240 s and 4 GiB on two cores, 20 s again
python benchmarks/quality.py copies [FOLDER]  1 % planted copies among real images that the
generator never saw, both classes, at 224 px; expected: at least 90 % found, about 1 % of the
others flagged
python benchmarks/quality.py frechet          the Fréchet step at d = 2048, 1,200 images a side;
expected: at least 20 times faster
python benchmarks/quality.py fid              both classes through one stand-in network, 300
images a folder; expected: at least 2 times faster
"""

import os, sys, tempfile, time, warnings
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, QualityConfig


def timed(f, *a, **k):
    start = time.perf_counter()
    return f(*a, **k), time.perf_counter() - start


def peak():  # GiB; not on Windows
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
        30 if sys.platform == "darwin" else 20
    )


def suite(folder="../shared/data/kermany-224", n=1200):
    "The synthetic set is made of real images, blurred: the time does not depend on what they show."
    import json
    from scipy.ndimage import gaussian_filter
    from cxr_synth.base.files import digest_file, write_text
    from cxr_synth.images.study_images import load_images, training_rows
    from cxr_synth.stages.data import stage_data
    from cxr_synth.stages.quality import quality_table, stage_quality

    with tempfile.TemporaryDirectory() as tmp:
        study, lines = Study(Path(tmp) / "study"), []
        stage_data(study, DataConfig(source=str(folder), resolution=224))
        rows = training_rows(study, 1.0, 0)
        for label, c in enumerate(("normal", "pneumonia")):
            ids = rows.image_id[rows.label == label].tolist()
            for k, im in enumerate(load_images(study, [ids[k % len(ids)] for k in range(n)])):
                p = study / f"synthetic/real100-rep0/{c}/{k:06d}.png"
                p.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(gaussian_filter(np.roll(im, 7, axis=k % 2), 1 + k % 3)).save(p)
                lines.append(
                    json.dumps(
                        dict(
                            file_name=f"{c}/{k:06d}.png",
                            label=label,
                            class_name=c,
                            sha256=digest_file(p),
                        )
                    )
                )
        write_text(study / "synthetic/real100-rep0/metadata.jsonl", "\n".join(lines) + "\n")
        cfg = QualityConfig(size=224)
        _, first = timed(stage_quality, study, cfg)
        memory = peak()
        os.rename(study / "quality", study / "before")  # only the cache is left
        _, second = timed(stage_quality, study, cfg)
        _, third = timed(stage_quality, study, cfg)
        print(
            f"suite: {first:.0f} s, peak {memory:.1f} GiB; again from the cache {second:.1f} s; again when complete {third:.1f} s   "
            f"threads {torch.get_num_threads()}, {len(rows)} real training images, {len(quality_table(study))} numbers"
        )


def copies(folder="../shared/data/kermany-224", side=224):
    """Three piles of patients: seen, unseen (the alarm's), fresh. The synthetic set: the fresh pile,
    and 1 % disguised copies of the seen one.
    """
    from cxr_synth.quality.copies import feature_space, pixel_space, wilson
    from cxr_synth.protocol.dataset import parse_name
    from cxr_synth.images.images import prepare_image

    spaces = dict(
        features=feature_space(lambda x: extract(x, size=side)),
        layout=feature_space(
            lambda x: extract(x, "efficientnet-lite0-layout", size=128), flip=True
        ),
        pixels=pixel_space(),
    )
    for c in ("NORMAL", "PNEUMONIA"):
        files = sorted((Path(folder) / "train" / c).glob("*.jpeg"))
        who = np.array([parse_name(p.stem)[1] for p in files])
        parts = np.array_split(np.random.default_rng(0).permutation(np.unique(who)), 3)
        seen, unseen, fresh = (
            np.stack(
                [
                    np.asarray(prepare_image(Image.open(files[k]), side))
                    for k in np.flatnonzero(np.isin(who, part))
                ]
            )
            for part in parts
        )
        references = {k: s.reference(seen) for k, s in spaces.items()}
        alarm = Alarm(look(spaces, references, unseen), who[np.isin(who, parts[1])])
        planted, disguise = plant(seen, each=max(20, len(fresh) // 100))
        caught = alarm.score(look(spaces, references, planted)) < alarm.threshold
        scores = alarm.score(look(spaces, references, fresh))
        k = int((scores < alarm.threshold).sum())
        print(
            f"copies, {c}: found {caught.mean():.0%} of {len(planted)} ({', '.join(f'{d} {caught[disguise == d].mean():.0%}' for d in dict.fromkeys(disguise))}); "
            f"fresh images flagged {k} of {len(fresh)}, 95 % {wilson(k, len(fresh))[0]:.2%} to {wilson(k, len(fresh))[1]:.2%}; at both ends of the threshold's interval "
            f"{(scores < alarm.interval[0]).mean():.2%} and {(scores < alarm.interval[1]).mean():.2%}"
        )


def frechet(n=1200, d=2048):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from cxr_synth.quality.metrics import frechet_distance, frechet_moments

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, d)) * np.sqrt(1 / np.arange(1, d + 1)) + s for s in (0, 0.05))
    moments = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    (mine, t), (slow, t2) = timed(frechet_distance, x, y), timed(frechet_moments, *moments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want, t1 = timed(calculate_frechet_distance, *moments)
        except TypeError as e:
            return print(
                f"frechet: {t:.2f} s (eigen-decomposition {t2:.2f} s); pytorch-fid does not work with this scipy: {e}"
            )
    print(
        f"frechet d = {d}, n = {n}: pytorch-fid {t1:.2f} s, eigen-decomposition {t2:.2f} s, here {t:.2f} s ({t1 / t:.0f} times faster); relative difference {abs(mine / want - 1):.1e}"
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
    from cxr_synth.images.phantom import draw_phantom
    from cxr_synth.quality.folders import calculate_fid

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
        mine, t = timed(
            lambda: [calculate_fid(*p, model=net, cache=Path(tmp) / "cache") for p in pairs]
        )
        _, again = timed(
            lambda: [calculate_fid(*p, model=net, cache=Path(tmp) / "cache") for p in pairs]
        )

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
            f"fid, 2 classes of {n} + {n}: pytorch-fid {t1:.1f} s, here {t:.1f} s ({t1 / t:.1f} times faster), again {again:.1f} s; "
            f"relative difference {max(abs(a / b - 1) for a, b in zip(mine, want)):.1e}"
        )


if __name__ == "__main__":
    dict(suite=suite, copies=copies, frechet=frechet, fid=fid)[
        sys.argv[1] if len(sys.argv) > 1 else "frechet"
    ](*sys.argv[2:3])
