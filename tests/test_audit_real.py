"""The audit on the real set (Kermany et al. 2018): 5,856 images of 224 px, and 87 originals. What is
known about them stands in their README and metadata.csv.
"""

import io, os
from pathlib import Path
import numpy as np, pytest
from PIL import Image, ImageOps
from cxr_synth.data.audit import audit
from cxr_synth.data.near_copies import copy_limit, near_copies, pair_crossings, rank_vectors
from cxr_synth.base.settings import DataConfig
from cxr_synth.data.sources import folder_source
from cxr_synth.data.survey import inspect_source
from cxr_synth.images.images import decode_image, prepare_file

DATA = Path(os.environ.get("CXR_DATA") or Path(__file__).parents[2] / "shared" / "data")
SQUARES, ORIGINALS = DATA / "kermany-224", DATA / "kermany-originals"
pytestmark = pytest.mark.skipif(
    not (SQUARES.is_dir() and ORIGINALS.is_dir()),
    reason=f"no real data in {DATA}: set CXR_DATA to the folder of kermany-224",
)


def read(folder):
    t, small, bad = inspect_source(folder_source(folder), DataConfig(source=str(folder), workers=2))
    assert not bad
    return t, small


@pytest.fixture(scope="module")
def squares():
    return read(SQUARES)


@pytest.fixture(scope="module")
def report(squares):
    return audit(*squares)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    t, small = read(ORIGINALS)
    out = tmp_path_factory.mktemp("prepared") / "out.png"
    return t.assign(
        prepared_bytes=[
            prepare_file((ORIGINALS / p).read_bytes(), p, out, 512, "squash") for p in t.path
        ]
    ), small


def trait(report, part, name):
    return next(r for r in report["shortcuts"] if (r["part"], r["name"]) == (part, name))


def test_counts(report):
    assert (
        report["n_images"],
        report["unparsed_names"],
        report["contradicting_names"],
        report["left_out"],
    ) == (5856, 0, 0, 0)
    assert report["official_images"] == {
        "train": dict(normal=1341, pneumonia=3875),
        "val": dict(normal=8, pneumonia=8),
        "test": dict(normal=234, pneumonia=390),
    }
    for where in ("official", "study"):
        assert set(report["shared_patients"][where].values()) == {0}
    assert (
        report["images_per_patient"]["most"] == 30
        and report["images_per_patient"]["patient"] == "bacteria-23"
    )


def test_exact_copies(report):
    for by in ("bytes", "pixels"):
        d = report["duplicates"][by]
        assert (d["groups"], d["images"], d["across"]) == (
            30,
            62,
            dict(patients=1, classes=0, official=0, splits=0),
        )


def test_no_near_copies_but_those_that_are_planted(squares, report):
    """Different children are never taken for copies; ten disguises of 20 images are all found, and
    nothing else.
    """
    assert report["near_duplicates"]["across"]["patients"] == 0
    t, small = squares
    picked = np.random.default_rng(0).choice(len(t), 20, replace=False)

    def jpeg(im):
        out = io.BytesIO()
        im.save(out, "JPEG", quality=30)
        return Image.open(out)

    disguise = [
        jpeg,
        lambda im: im.point(lambda v: 0.6 * v + 30),
        lambda im: im.point(lambda v: 255 * (v / 255) ** 0.6),
        lambda im: im.point(lambda v: 255 * (v / 255) ** 1.6),
        ImageOps.equalize,
        ImageOps.mirror,
        ImageOps.invert,
        lambda im: ImageOps.invert(ImageOps.mirror(im)),
        lambda im: im.resize((300, 260)),
        lambda im: im.resize((96, 96)),
    ]
    images = [decode_image((SQUARES / t.path[k]).read_bytes(), t.path[k]) for k in picked]
    more = np.stack(
        [
            np.asarray(f(im).resize((32, 32), Image.Resampling.LANCZOS))
            for im in images
            for f in disguise
        ]
    )
    everyone = t.iloc[[*range(len(t)), *np.repeat(picked, 10)]].reset_index(drop=True)
    n = len(everyone)
    everyone["patient_id"] = [
        f"new-{k}" if k >= len(t) else p for k, p in enumerate(everyone.patient_id)
    ]
    z = rank_vectors(np.concatenate([small, more]))
    limit = copy_limit(z, everyone.patient_id, 0)
    pairs, count = near_copies(z, np.arange(n), pair_crossings(everyone), limit, keep=20_000)
    found = {(i, j) for i, j, c, _ in pairs if c >= limit}
    copies_of = {len(t) + 10 * a + b: k for a, k in enumerate(picked) for b in range(10)}
    assert {(k, j) for j, k in copies_of.items()} <= found
    twins = t.pixels_sha256.tolist() + [t.pixels_sha256[copies_of[j]] for j in range(len(t), n)]
    assert all(twins[i] == twins[j] for i, j in found)


def test_shift(report):
    normal, pneumonia = report["shift"]
    assert normal["auc"] >= 0.85 and normal["low"] > pneumonia["high"] > pneumonia["auc"] > 0.58
    assert all(abs(r["control"] - 0.5) < 0.05 for r in report["shift"])


def test_findings(report):
    level = {f["name"]: f["level"] for f in report["findings"]}
    assert {k for k, v in level.items() if v == "warning"} == {"shortcuts", "shift, normal"}
    assert (
        level["official val"]
        == level["balance"]
        == level["exact copies"]
        == level["shift, pneumonia"]
        == "note"
    )
    assert (
        level["near copies"]
        == level["patients"]
        == level["official overlap"]
        == level["our splits"]
        == "ok"
    )


def test_any_order_of_rows(squares, report):
    t, small = squares
    order = np.random.default_rng(0).permutation(len(t))
    assert audit(t.iloc[order], small[order]) == report


def test_bytes_give_the_class_away_before_the_image_path_only(originals):
    r = audit(*originals)
    assert (
        trait(r, "train", "bytes per pixel")["auc"] >= 0.95
        and trait(r, "all", "bytes per pixel")["auc"] >= 0.92
    )
    assert (
        trait(r, "train", "JPEG table")["auc"] >= 0.95
        and trait(r, "train", "colour profile")["auc"] >= 0.95
    )
    after = trait(r, "train", "bytes per pixel, prepared")
    picture = trait(r, "train", "roughness of the thumbnail")
    assert (
        after["high"] < trait(r, "train", "bytes per pixel")["low"]
        and after["low"] < picture["high"]
    )
    assert {f["name"]: f["level"] for f in r["findings"]}["shortcuts"] == "warning"


def test_the_encoder_is_gone_from_prepared_images(originals, tmp_path):
    """Fine originals, stored again at quality 75 before the image path: a third of the bytes, but
    the same prepared size within 2 %.
    """
    fine = originals[0][originals[0].quality > 85]
    assert len(fine) > 25
    before, after = [], []
    for row in fine.itertuples():
        coarse = io.BytesIO()
        decode_image((ORIGINALS / row.path).read_bytes(), row.path).save(coarse, "JPEG", quality=75)
        before.append(len(coarse.getvalue()) / row.bytes)
        after.append(
            prepare_file(coarse.getvalue(), row.path, tmp_path / "out.png", 512, "squash")
            / row.prepared_bytes
        )
    assert (
        np.median(before) < 0.45
        and abs(np.median(after) - 1) < 0.02
        and max(abs(np.array(after) - 1)) < 0.05
    )
