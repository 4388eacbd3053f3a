"Quality metrics on the real set (Kermany et al. 2018): collapse, planted copies, fresh images."

import os
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from cxr_synth.quality.copies import (
    CopyThreshold,
    feature_space,
    nearest_in_spaces,
    pixel_space,
    plant_copies,
    wilson,
)
from cxr_synth.protocol.dataset import parse_name
from cxr_synth.images.images import prepare_image
from cxr_synth.images.features import extract_features
from cxr_synth.quality.metrics import (
    bandwidth,
    density_coverage,
    expected_coverage,
    ms_ssim,
    random_pairs,
    rbf_mmd,
    source_auc,
    top_mean,
)
from cxr_synth.stats.auc import auroc

REAL = (
    Path(os.environ.get("CXR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    / "kermany-224"
)
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(),
    reason=f"no real data set in {REAL.parent} (set CXR_DATA to the folder that holds kermany-224); "
    "phantoms cover the code",
)


def read(files):
    return np.stack([np.asarray(prepare_image(Image.open(p), 64)) for p in files])


def embed(x):
    return extract_features(x, size=64)


@pytest.fixture(scope="module")
def normals():  # three patient-disjoint sets of normal images: seen, unseen, fresh
    files = sorted((REAL / "train/NORMAL").glob("*.jpeg"))
    who = np.array([parse_name(p.stem)[1] for p in files])
    names = np.random.default_rng(0).permutation(np.unique(who))
    piles = [np.flatnonzero(np.isin(who, part)) for part in np.array_split(names, 3)]
    return [(read([files[k] for k in part]), who[part]) for part in piles]


@pytest.fixture(scope="module")
def search(normals):
    spaces = dict(
        features=feature_space(embed),
        layout=feature_space(
            lambda x: extract_features(x, "efficientnet-lite0-layout", size=64), flip=True
        ),
        pixels=pixel_space(),
    )
    references = {k: s.reference(normals[0][0]) for k, s in spaces.items()}
    return lambda x: nearest_in_spaces(spaces, references, x)


@pytest.fixture(scope="module")
def copy_test(normals, search):
    return CopyThreshold(search(normals[1][0]), normals[1][1])


def test_planted_copies_are_found(normals, search, copy_test):
    planted, disguise = plant_copies(normals[0][0], each=30)
    caught = copy_test.flags(search(planted))
    print({k: float(caught[disguise == k].mean()) for k in set(disguise)}, copy_test.threshold)
    assert caught.mean() >= 0.9


def test_fresh_images_are_flagged_at_one_percent(normals, search, copy_test):
    scores = copy_test.score(search(normals[2][0]))
    low, high = wilson(int((scores < copy_test.threshold).sum()), len(scores))
    at = [
        (scores < t).mean() for t in copy_test.interval
    ]  # the threshold itself rests on few images
    print((scores < copy_test.threshold).mean(), (low, high), at)
    assert low <= 0.01 <= high or at[0] <= 0.01 <= at[1]


def test_a_collapsed_set_is_called_less_diverse(normals):
    real, rest = normals[0][0][:400], normals[1][0][:400]
    one = np.repeat(normals[2][0][:100], 4, axis=0)
    collapsed = (
        (one + np.random.default_rng(0).normal(0, 3, one.shape))
        .clip(0, 255)
        .round()
        .astype(np.uint8)
    )
    f, g, h = map(embed, (real, rest, collapsed))
    width = bandwidth(f)
    assert rbf_mmd(f, h, width) > 20 * abs(rbf_mmd(f, g, width))
    assert (
        density_coverage(f, g)[1] > expected_coverage(400, 400) - 0.05 > density_coverage(f, h)[1]
    )
    pairs = random_pairs(400, 800)
    alike = [top_mean(ms_ssim(x, *pairs)) for x in (rest, collapsed)]
    print(alike)
    assert alike[1] > alike[0] + 0.05


def test_torchvision_weights_from_a_folder_see_pneumonia():
    "MobileNetV2's real ImageNet file, named by its folder."
    weights = REAL.parent / "weights" / "imagenet"
    if not (weights / "mobilenet_v2-b0353104.pth").is_file():
        pytest.skip(f"no mobilenet_v2-b0353104.pth in {weights}")
    from cxr_synth.quality.measure import fit_head

    files = [
        sorted((REAL / s / c).glob("*.jpeg"))[:n]
        for s, n in (("train", 100), ("test", 60))
        for c in ("NORMAL", "PNEUMONIA")
    ]
    x = extract_features(read(sum(files, [])), "mobilenet-v2", 64, weights=str(weights))
    label = np.repeat([0, 1, 0, 1], [len(f) for f in files])
    assert auroc(label[200:], fit_head(x[:200], label[:200])(x[200:])) > 0.8


def test_source_auc_of_two_sets_of_real_images(normals):
    f, g = embed(normals[0][0][:300]), embed(normals[1][0][:300])
    assert abs(source_auc(f, g, normals[0][1][:300], normals[1][1][:300]) - 0.5) < 0.08
