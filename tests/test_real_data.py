"The data stage on the real set (Kermany et al. 2018, 224 px), against its own metadata.csv."

import os
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cxr_synth.base.settings import DataConfig
from cxr_synth.data.sources import folder_source
from cxr_synth.data.splits import draw_fractions
from cxr_synth.data.survey import inspect_source
from cxr_synth.images.study_images import assert_disjoint
from cxr_synth.images.images import prepare_file

REAL = (
    Path(os.environ.get("CXR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    / "kermany-224"
)
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(),
    reason=f"no real data set in {REAL.parent} (set CXR_DATA to the folder of kermany-224)",
)


@pytest.fixture(scope="module")
def source():
    return folder_source(REAL)


@pytest.fixture(scope="module")
def manifest(source):
    return inspect_source(source, DataConfig(source=str(REAL), workers=2))[0]


@pytest.fixture(scope="module")
def truth():
    t = pd.read_csv(REAL / "metadata.csv", dtype=str, keep_default_na=False)
    return t.assign(image_id=t.file.map(lambda f: Path(f).stem)).sort_values(
        "image_id", ignore_index=True
    )


def test_counts(manifest, truth):
    assert manifest.image_id.tolist() == truth.image_id.tolist() and len(manifest) == 5856
    assert manifest.official_split.tolist() == truth.split.tolist()
    assert manifest.kind.tolist() == truth.kind.tolist()
    counts = manifest.groupby(["official_split", "class_name"]).size()
    assert counts.to_dict() == {
        ("train", "normal"): 1341,
        ("train", "pneumonia"): 3875,
        ("val", "normal"): 8,
        ("val", "pneumonia"): 8,
        ("test", "normal"): 234,
        ("test", "pneumonia"): 390,
    }


def same_partition(a, b):
    "Do two labelings put the same items together?"
    pairs = pd.DataFrame(dict(a=list(a), b=list(b))).drop_duplicates()
    return pairs.a.is_unique and pairs.b.is_unique


def test_patients(manifest, truth):
    assert same_partition(manifest.patient_id, truth.patient_key)
    assert manifest[manifest.official_split == "test"].patient_id.nunique() == 428


def test_exact_duplicates(manifest, truth):
    copies = truth.exact_duplicate_group != ""
    assert (manifest.duplicate_group != "").tolist() == copies.tolist()
    assert same_partition(manifest.duplicate_group[copies], truth.exact_duplicate_group[copies])
    assert manifest.duplicate_group[copies].nunique() == 30


def test_splits(manifest):
    assert (manifest.split != "").all() and (manifest.kind != "").all()
    patients = manifest.groupby(["split", "class_name"]).patient_id.nunique().unstack()
    assert (
        abs(
            patients.loc["val"].sum() / patients.loc[["train", "val", "internal"]].to_numpy().sum()
            - 0.15
        )
        < 0.01
    )
    assert (patients.loc["train"] - patients.loc["internal"]).abs().max() <= 1
    assert manifest[manifest.split == "test"].class_name.value_counts().to_dict() == {
        "normal": 234,
        "pneumonia": 390,
    }


def test_fractions(manifest):
    f = pd.DataFrame(draw_fractions(manifest, seed=0)).merge(
        manifest[["image_id", "split", "kind", "patient_id"]]
    )
    f["min_fraction"] = f.min_fraction.astype(float)
    everyone = f[f.split.isin(["train", "internal"])].groupby("kind").patient_id.nunique()
    for fraction in (0.05, 0.1, 0.25, 0.5):
        drawn = f[(f.split == "train") & (f.min_fraction <= fraction)]
        assert (
            drawn.groupby(["replicate", "kind"]).patient_id.nunique().unstack() / everyone
            - fraction
        ).abs().max().max() < 0.01
    for _, g in f.groupby("replicate"):
        few = g[(g.split == "train") & (g.min_fraction <= 0.05)]
        assert_disjoint(
            manifest[manifest.image_id.isin(few.image_id)], manifest[manifest.split == "internal"]
        )


def test_another_order_of_files(source, manifest):
    rng = np.random.default_rng(0)
    source.rows = [source.rows[k] for k in rng.permutation(len(source.rows))]
    again, _, _ = inspect_source(source, DataConfig(source=str(REAL), workers=1))
    assert again.equals(manifest)


def test_an_image(source, tmp_path):
    path = "train/PNEUMONIA/person1_bacteria_1.jpeg"
    prepare_file(source.read(path), path, tmp_path / "a.png", 64)
    from PIL import Image

    with Image.open(tmp_path / "a.png") as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "L", "PNG")
