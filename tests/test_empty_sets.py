"""Sets of images that show nothing, numbers that are not finite, and damaged caches: none reaches a
classifier, and each is named.
"""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_synth.base.cache import cached
from cxr_synth.base.files import CxrError, digest_file, write_csv, write_text
from cxr_synth.base.loop import Loop, TrainedPart
from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.diffusion import image_set, sampling
from cxr_synth.images.features import compute_features
from cxr_synth.images.images import pixel_cache
from cxr_synth.images.study_images import load_synthetic, shows_nothing
from cxr_synth.protocol.sets import load_metadata, refuse_empty, refuse_empty_set

RNG = np.random.default_rng(0)
EMPTY = {
    "not a number": lambda shape: np.full(shape, np.nan, np.float32),
    "infinite": lambda shape: np.full(shape, np.inf, np.float32),
    "one NaN in each": lambda shape: _with_a_nan(shape),
    "black": lambda shape: np.zeros(shape, np.float32),
    "grey": lambda shape: np.full(shape, 0.5, np.float32),
    "white": lambda shape: np.ones(shape, np.float32),
    "nearly black": lambda shape: RNG.random(shape, np.float32) * 0.02,
    "nearly white": lambda shape: 1 - RNG.random(shape, np.float32) * 0.02,
}


def _with_a_nan(shape):
    x = RNG.random(shape, np.float32)
    x[:, 0, 3, 3] = np.nan
    return x


def draw(monkeypatch, make, classes=("NORMAL", "PNEUMONIA"), only=None):
    "Let the sampler draw what `make` gives."
    real = sampling.Sampler.__call__

    def call(self, seeds):
        images = real(self, seeds)
        made = make(images.shape)
        keep = [k for k, seed in enumerate(seeds) if only and seed % only]
        made[keep] = RNG.random((len(keep), *images.shape[1:]))
        return made

    monkeypatch.setattr(sampling.Sampler, "__call__", call)


OTHER = ("--generate.num-inference-steps", "1", "--exploratory")  # than the plan has sealed
ANEW = (*OTHER, "--redo")


@pytest.mark.parametrize("kind", EMPTY)
def test_a_set_of_nothing_stops_generate(study_copy, cxr_synth_command, monkeypatch, kind):
    draw(monkeypatch, EMPTY[kind])
    name = "real010-rep0"
    for more in (ANEW, OTHER):  # the second time all images are there
        done = cxr_synth_command("generate", study_copy.root, *more)
        assert done.status == 2 and "Traceback" not in done.err
        for text in (name, " of 6 images of normal", "show nothing", "--train.learning-rate"):
            assert text in done.err, done.err
        assert done.err.count("\n") <= 6
    assert read_json(study_copy / f"synthetic/{name}/stage.json")["status"] == "running"


def test_some_black_images_do_not_stop_generate(study_copy, cxr_synth_command, monkeypatch):
    draw(monkeypatch, EMPTY["black"], only=2)
    assert cxr_synth_command("generate", study_copy.root, *ANEW).status == 0
    flags = read_csv(study_copy / "synthetic/real010-rep0/flags.csv")
    assert "constant" in {m["reason"] for m in flags}


def test_a_long_set_is_given_up_soon(study_copy, cxr_synth_command, monkeypatch):
    "Not after a thousand black images."
    monkeypatch.setattr(image_set, "_SOON", 2)
    draw(monkeypatch, EMPTY["black"])
    assert cxr_synth_command("generate", study_copy.root, *ANEW).status == 2
    folder = study_copy / "synthetic/real010-rep0"
    assert len(list(folder.rglob("*.png"))) == 2 and not (folder / "metadata.jsonl").exists()


@pytest.mark.parametrize("reason", ["not a number", "constant", "black", "white"])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_what_the_gate_noted_is_read(study_copy, reason, share):
    name = "real010-rep0"
    names = [m["file_name"] for m in load_metadata(study_copy, name) if m["label"] == 1]
    rows = [
        dict(file_name=n, reason=reason, by="gate") for n in names[: -int(-share * len(names) // 1)]
    ]
    write_csv(study_copy / f"synthetic/{name}/flags.csv", ["file_name", "reason", "by"], rows)
    if share < 0.9:
        return refuse_empty_set(study_copy, name)
    with pytest.raises(CxrError, match="images of pneumonia show nothing"):
        refuse_empty_set(study_copy, name)


def test_greys_outside_the_real_range_are_no_emptiness(study_copy):
    name = "real010-rep0"
    rows = [
        dict(file_name=m["file_name"], reason="mean 3 outside 40 to 200", by="gate")
        for m in load_metadata(study_copy, name)
    ]
    write_csv(study_copy / f"synthetic/{name}/flags.csv", ["file_name", "reason", "by"], rows)
    refuse_empty_set(study_copy, name)


@pytest.mark.parametrize("value", [0, 3, 128, 255])
@pytest.mark.parametrize("cls", ["normal", "pneumonia"])
def test_black_images_on_the_disk_are_seen(study_copy, value, cls):
    "A set whose gate noted nothing, such as one that was put there."
    folder = study_copy / "synthetic/real010-rep0"
    lines = load_metadata(study_copy, "real010-rep0")
    for m in lines:
        if m["class_name"] == cls:
            Image.fromarray(np.full((32, 32), value, np.uint8)).save(folder / m["file_name"])
            m["sha256"] = digest_file(folder / m["file_name"])
    write_text(folder / "metadata.jsonl", "".join(json.dumps(m) + "\n" for m in lines))
    with pytest.raises(CxrError, match=f"6 of 6 images of {cls} show nothing"):
        load_synthetic(study_copy, "real010-rep0")


def test_pictures_show_something():
    x = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    assert not shows_nothing(x) and not shows_nothing(x // 4) and not shows_nothing(255 - x // 4)
    refuse_empty("s", dict(normal=0), dict(normal=0), "s")
    refuse_empty("s", dict(normal=8), dict(normal=9), "s", 0.9)


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers(value):
    def view(images):
        return np.full((len(images), 4), value)

    with pytest.raises(CxrError, match="not finite"):
        compute_features(np.zeros((3, 32, 32), np.uint8), view, 32, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 7, 12, 19])
def test_a_diverging_training_says_who_and_when(tmp_path, value, step):
    net = torch.nn.Linear(2, 1)
    path = tmp_path / "normal.pt"

    def losses(k, bad=None):
        loss = net(torch.ones(1, 2)).square().sum() * (value if k == bad else 1.0)
        loop.optimizer.backward(loss)
        return dict(loss=loss.detach())

    loop = Loop(
        dict(net=TrainedPart(net, 1e-3)), path, 20, every=5, setting="--train.learning-rate"
    )
    with pytest.raises(CxrError) as told:
        loop.run(lambda k: losses(k, step), "real010-rep0 normal")
    for text in ("real010-rep0 normal", "step", "--train.learning-rate", str(path)):
        assert text in str(told.value) or (text == str(path) and step < 5), str(told.value)
    if step >= 5:  # the last checkpoint is from before
        saved = torch.load(path, weights_only=True)
        assert saved["step"] <= step and all(p.isfinite().all() for p in saved["params"].values())
    else:
        assert not path.exists()


# ---- damaged caches


def _npy(array):
    def write(path, good):
        with open(path, "wb") as f:
            np.save(f, array(good), allow_pickle=True)

    return write


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was run",))


DAMAGE = {
    "NaN": _npy(lambda x: np.full_like(x, np.nan)),
    "one NaN": _npy(lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, np.nan, x)),
    "other numbers": _npy(lambda x: x + 1),
    "zeros": _npy(np.zeros_like),
    "one row less": _npy(lambda x: x[:-1]),
    "other shape": _npy(lambda x: x.reshape(-1)),
    "other type": _npy(lambda x: x.astype(np.float16)),
    "objects": _npy(lambda x: np.array([Bomb()], dtype=object)),
    "pickle": lambda path, good: path.write_bytes(pickle.dumps(Bomb())),
    "empty": lambda path, good: path.write_bytes(b""),
    "text": lambda path, good: path.write_text("moved to the other disk"),
    "cut header": lambda path, good: path.write_bytes(path.read_bytes()[:90]),
    "cut numbers": lambda path, good: path.write_bytes(path.read_bytes()[:-50]),
    "longer": lambda path, good: path.write_bytes(path.read_bytes() + b"x"),
    "one bit": lambda path, good: _flip(path),
}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[140] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path, capsys, kind, mmap):
    good = np.random.default_rng(0).random((6, 5)).astype(np.float32)
    cached(tmp_path, "features", 1, lambda: good)
    path = next(tmp_path.iterdir())
    assert (np.load(path) == good).all()  # other programs read it
    DAMAGE[kind](path, good)
    for said in (1, 0):
        assert (cached(tmp_path, "features", 1, lambda: good, mmap) == good).all()
        told = capsys.readouterr()
        assert told.err.count("is made anew") == told.err.count("\n") == said and not told.out


PIXEL_DAMAGE = [k for k in DAMAGE if k != "one NaN"]


@pytest.mark.parametrize("kind", PIXEL_DAMAGE)
def test_a_damaged_pixel_cache_is_made_anew(tmp_path, capsys, kind):
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for k, path in enumerate(paths):
        Image.fromarray(np.full((16, 16), 40 * k + 9, np.uint8)).save(path)

    def pixels():
        return pixel_cache(tmp_path / "cache", [p.stem for p in paths], paths, 16)[["0", "1", "2"]]

    good = pixels()
    DAMAGE[kind](next((tmp_path / "cache").glob("*.npy")), good)
    assert (pixels() == good).all() and capsys.readouterr().err.count("is made anew") == 1


@pytest.mark.parametrize("kind", ["NaN", "cut header", "objects", "empty", "other shape"])
@pytest.mark.parametrize("stage", ["quality", "experiments"])
def test_damaged_caches_of_a_study(study_copy, cxr_synth_command, stage, kind):
    before = (study_copy / "results.csv").read_bytes()
    for path in study_copy.root.glob("cache/**/*.npy"):
        if stage == "quality" or "classifier" in path.parts:
            DAMAGE[kind](path, np.load(path))
    flag = dict(quality="--quality.halvings=3", experiments="--experiments.views=1")[stage]
    done = cxr_synth_command(stage, study_copy.root, "--redo", "--exploratory", flag)
    assert done.status == 0 and "Traceback" not in done.err and "is made anew" in done.err
    assert stage == "quality" or (study_copy / "results.csv.redo1").read_bytes() == before
