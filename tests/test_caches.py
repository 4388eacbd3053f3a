"""A cache must not answer a question that was not asked: its key holds all on which the result
depends, and a damaged file is made anew.
"""

import functools, json

import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from cxr_synth import guide
from cxr_synth.classify import feature_store
from cxr_synth.diffusion import trainer
from cxr_synth.images import features, images
from cxr_synth.quality import folders as quality_folders
from cxr_synth.base.cache import cached, recorded
from cxr_synth.base.files import CxrError, digest_file
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig
from cxr_synth.images.study_images import load_manifest, training_rows
from cxr_synth.stages.data import stage_data

# -- the helper


def test_cached_computes_once_for_a_key_and_says_when_it_makes_a_file_anew(tmp_path, capsys):
    calls = []

    def compute():
        calls.append(1)
        return np.arange(6.0).reshape(2, 3)

    for _ in range(2):
        assert cached(tmp_path, "a", dict(n=1), compute).tolist() == [[0, 1, 2], [3, 4, 5]]
    cached(tmp_path, "a", dict(n=2), compute)
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 2 and capsys.readouterr().err == ""
    for damage in (b"", b"no array", b"\x93NUMPY", next(tmp_path.glob("*.npy")).read_bytes()[:-5]):
        for path in tmp_path.glob("*.npy"):
            path.write_bytes(damage)
        for mmap in (False, True):
            assert cached(tmp_path, "a", dict(n=1), compute, mmap=mmap)[1, 2] == 5
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "is made anew" in said, damage


def test_a_failed_computation_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, "a", 1, lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_was_edited_is_read_again_and_nobody_else_sees_what_a_reader_changes(
    tmp_path,
):
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(patients=40))
    path, first = study / "data/manifest.csv", load_manifest(study)
    first.loc[0, "split"] = "nowhere"
    assert load_manifest(study).split[0] != "nowhere"
    text = path.read_text()
    assert text.count(",internal,") > 1
    width = str(first.width[0])
    path.write_text(text.replace(f",{width},", f",{int(width) + 1},", 1))  # of the same length
    assert (load_manifest(study).width == int(width) + 1).sum() == 1
    path.write_text(text.replace(",internal,", ",train,", 1))
    assert (load_manifest(study).split == "internal").sum() == text.count(",internal,") - 1
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CxrError, match="manifest.csv"):
        load_manifest(study)


def test_recorded_is_made_again_for_another_key_and_for_a_damaged_file(tmp_path, capsys):
    calls, path = [], tmp_path / "run.json"

    def compute():
        calls.append(1)
        return dict(n=len(calls))

    for key, n in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        assert recorded(path, key, compute)["n"] == n
    for damage in ("", "{", "[]", "null"):
        path.write_text(damage)
        assert recorded(path, "a", compute)["n"] == len(calls)
    assert len(calls) == 7 and "is made anew" in capsys.readouterr().err


# -- the guide's records


class Net(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x):
        return self.layers(x)


def paint(folder, seed, n=4):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(n):
        Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(
            folder / f"{k}.bmp".replace("bmp", "png")
        )


@pytest.fixture
def folders(tmp_path):
    out = {}
    for i, part in enumerate(("real", "synthetic", "test")):
        for j, name in enumerate(("normal", "pneumonia")):
            paint(tmp_path / part / name, 10 * i + j)
        out[f"{part}_dirs"] = {
            name: str(tmp_path / part / name) for name in ("normal", "pneumonia")
        }
    return out


def ask(folders, tmp_path, monkeypatch, **changed):
    "Run the guide's experiments; how many trainings were made."
    trained, train = [], guide.train_classifier
    monkeypatch.setattr(
        guide, "train_classifier", lambda *a, **k: trained.append(1) or train(*a, **k)
    )
    monkeypatch.setattr(
        guide, "GUIDE_EXPERIMENTS", dict(synth_100=dict(real_ratio=1.0, synthetic_ratio=1.0))
    )
    how = dict(
        num_epochs=1, seeds=(1,), batch_size=4, num_workers=0, size=32, model=Net, device="cpu"
    )
    guide.run_all_experiments(**folders, output_dir=tmp_path / "results", **how | changed)
    monkeypatch.setattr(guide, "train_classifier", train)
    return len(trained)


@pytest.mark.parametrize("part", ["real", "synthetic", "test"])
def test_guide_trains_again_when_a_file_has_other_content(folders, tmp_path, monkeypatch, part):
    assert [ask(folders, tmp_path, monkeypatch) for _ in range(2)] == [1, 0]
    paint(tmp_path / part / "normal", 99)
    assert [ask(folders, tmp_path, monkeypatch) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "changed",
    [dict(size=40), dict(model=functools.partial(Net, 3)), dict(num_epochs=2), dict(batch_size=2)],
    ids=["size", "network", "epochs", "batch"],
)
def test_guide_trains_again_with_other_settings(folders, tmp_path, monkeypatch, changed):
    assert [ask(folders, tmp_path, monkeypatch, **c) for c in ({}, {}, changed, changed)] == [
        1,
        0,
        1,
        0,
    ]


def test_guide_trains_again_after_a_damaged_record(folders, tmp_path, monkeypatch):
    ask(folders, tmp_path, monkeypatch)
    (tmp_path / "results/synth_100_seed1.json").write_text('{"about": "')
    assert ask(folders, tmp_path, monkeypatch) == 1


# -- activations


class Shift(nn.Module):
    "Features that hang on two weights whose sum stays the same."

    def __init__(self, a, b):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([a, b]))

    def forward(self, x):
        return [(x.mean((1, 2, 3))[:, None] * self.w)[..., None, None]]


def test_activations_of_other_weights_with_the_same_sum(tmp_path):
    paint(tmp_path / "images", 0)
    a, b = (
        quality_folders.folder_activations(
            tmp_path / "images", Shift(*w), 2, "cpu", tmp_path / "cache"
        )
        for w in ((1.0, 3.0), (2.0, 2.0))
    )
    assert np.allclose(a[:, 1], 3 * a[:, 0]) and np.allclose(b[:, 1], b[:, 0])


# -- latents, features, pixels


class Plain:
    "Stands in for an autoencoder: the latent is a small copy of the image."

    def __init__(self, factor):
        self.net = nn.Linear(1, 1, bias=False)
        self.net.weight.data[:] = factor
        self.config = dict(latent_channels=4)
        self.dtype = torch.float32
        self.calls = 0

    def state_dict(self):
        return self.net.state_dict()

    def encode(self, x):
        self.calls += 1
        z = nn.functional.avg_pool2d(x, 4)[:, :1].expand(-1, 4, -1, -1) * self.net.weight
        return type("Out", (), dict(latents=z.detach()))()


def test_latents_of_other_weights_and_other_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    one, two = Plain(1.0), Plain(2.0)
    first = trainer.cached_latents(one, x, folder=tmp_path)[0]
    assert torch.equal(trainer.cached_latents(one, x, folder=tmp_path)[0], first) and one.calls == 1
    assert torch.equal(trainer.cached_latents(two, x, folder=tmp_path)[0], 2 * first)
    assert not torch.equal(trainer.cached_latents(one, x[::-1], folder=tmp_path)[0], first)
    for p in tmp_path.iterdir():
        p.write_bytes(b"damaged")
    assert torch.equal(trainer.cached_latents(one, x, folder=tmp_path)[0], first)


def test_features_of_another_version(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    before = features.extract_features(x, size=32, cache=tmp_path)
    monkeypatch.setattr(
        features, "compute_features", lambda images, *a: np.zeros((len(images), 2), np.float32)
    )
    assert (features.extract_features(x, size=32, cache=tmp_path) == before).all()
    monkeypatch.setattr(features, "FEATURES_VERSION", 99)
    assert features.extract_features(x, size=32, cache=tmp_path).shape == (3, 2)


@pytest.mark.parametrize("damaged", ["*.npy", "*.json"])
def test_damaged_pixel_cache_is_built_anew(tmp_path, capsys, damaged):
    paint(tmp_path / "images", 0)
    paths = sorted((tmp_path / "images").iterdir())

    def pixels():
        return images.pixel_cache(tmp_path / "cache", [p.stem for p in paths], paths, 16)[
            [p.stem for p in paths]
        ]

    before = pixels()
    for p in (tmp_path / "cache").glob(damaged):
        p.write_bytes(p.read_bytes()[:40])
    assert (pixels() == before).all() and capsys.readouterr().err.count("is made anew") == 1


# -- what classifiers look at


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    s = Study(tmp_path_factory.mktemp("caches") / "study")
    stage_data(s, DataConfig(source="phantom", patients=30, resolution=32))
    return s


def pixels_store(study):
    cfg = ExperimentsConfig(method="finetune", size=32)
    return feature_store.FeatureStore(study, cfg, 0, "cpu")


def test_views_of_another_augmentation(study, monkeypatch):
    before = np.array(pixels_store(study).view(1))
    monkeypatch.setitem(
        feature_store.ALTERATIONS, "gentle", dict(turn=90, shift=0.3, zoom=(0.5, 0.6), contrast=0.5)
    )
    assert (np.array(pixels_store(study).view(1)) != before).any()


def test_damaged_views_are_made_anew(study, capsys):
    before = np.array(pixels_store(study).view(0))
    for p in (study / "cache/classifier").glob("view0-*.npy"):
        p.write_bytes(p.read_bytes()[:100])
    assert (
        np.array(pixels_store(study).view(0)) == before
    ).all() and "is made anew" in capsys.readouterr().err


def test_round_trips_made_anew(study):
    "The same images in the same places, through another autoencoder: other files, so another array."
    folder = study / "synthetic/real050-rep0-roundtrip"
    folder.mkdir(parents=True)
    ids = training_rows(study, 0.5, 0).image_id.tolist()
    found = []
    for value in (7, 9):
        lines = []
        for image_id in ids:
            path = folder / f"{image_id}.png"
            Image.fromarray(np.full((32, 32), value, np.uint8)).save(path)
            line = dict(file_name=path.name, image_id=image_id, sha256=digest_file(path))
            lines.append(json.dumps(line) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
        found.append(int(np.array(pixels_store(study).roundtrip(0.5, 0)).max()))
    assert found == [7, 9]
