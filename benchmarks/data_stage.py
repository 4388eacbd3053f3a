"""The data stage on a whole data set, part by part: reading, splits, prepared images, audit, pixel
caches; seconds and peak memory.

    python benchmarks/data_stage.py [--data FOLDER] [--workers 2]

Without --data it draws 2,000 phantom patients. Each part is timed once, since all of it takes
minutes; run it on a quiet machine.

"""

from functools import partial
import argparse, os, resource, tempfile, time
from pathlib import Path
from cxr_synth.base.files import write_csv, write_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.data.sources import open_source
from cxr_synth.data.splits import draw_fractions, too_small
from cxr_synth.data.survey import MANIFEST_COLUMNS, inspect_source, write_prepared
from cxr_synth.images.study_images import load_images
from cxr_synth.stages.data import write_audits


def timed(name, f):
    "Run one part and print what it took."
    start = time.perf_counter()
    out = f()
    seconds = time.perf_counter() - start
    print(
        (
            f"{name:28} {seconds:7.1f} s   peak "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:5.2f} GiB"
        ),
        flush=True,
    )
    return out, seconds


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    (
        p.add_argument("--data", default="phantom"),
        p.add_argument("--workers", type=int, default=2),
        p.add_argument("--resolution", type=int, default=224),
    )
    args = p.parse_args()
    os.environ.setdefault("CXR_QUIET", "1")
    with tempfile.TemporaryDirectory() as tmp:
        study = Study(Path(tmp) / "study")
        cfg = DataConfig(
            source=args.data, patients=2000, resolution=args.resolution, workers=args.workers
        )
        source, drawing = timed("find the files", lambda: open_source(study, cfg))
        (t, small, bad), a = timed(
            f"read {len(source.rows):,} files, split", lambda: inspect_source(source, cfg)
        )
        sizes, b = timed(
            f"prepare at {cfg.resolution} px", lambda: write_prepared(study, source, t, cfg)
        )
        _, c = timed(
            "audit and its page",
            lambda: write_audits(
                study,
                t.assign(prepared_bytes=sizes),
                small,
                source.notes + too_small(t),
                bad,
                cfg.seed,
            ),
        )
        _, d = timed("fractions", lambda: draw_fractions(t, cfg.seed))
        done, e = Study(Path(tmp) / "done"), 0
        os.makedirs(done.root), os.replace(study / "data", done / "data")
        write_csv(done / "data/manifest.csv", MANIFEST_COLUMNS, t.to_dict("records"))
        write_json(done.record_path("data"), dict(settings=cfg.settings()))
        for size in (cfg.resolution, 64):
            load = partial(load_images, done, t.image_id[:1], size=size)
            x, s = timed(f"pixel cache at {size} px", load)
            e += s
        print(
            f"{'all':28} {a + b + c + d + e:7.1f} s   {len(t) / (a + b + c + d + e):.0f} images/s"
        )
