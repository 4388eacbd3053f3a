"Folders as users have them: one image, other sizes and modes, damaged files, equal folders, missing classes."

import warnings
import numpy as np
import pytest
import torch
from PIL import Image
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import QualityConfig
from cxr_synth.images.features import extract_features
from cxr_synth.images.folders import image_files, read_folder
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.quality.folders import (
    calculate_fid,
    create_comparison_grid,
    folder_activations,
    measure_folders,
)
from cxr_synth.quality.measure import set_similarity
from cxr_synth.quality.metrics import frechet_distance


class Means(torch.nn.Module):  # 16 patch means in Inception's place
    def forward(self, x):
        return [torch.nn.functional.adaptive_avg_pool2d(x, 4)[:, :1].reshape(len(x), 16, 1, 1)]


def fill(folder, n, first=0, label=0, size=32, suffix=".png", mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.fromarray(draw_phantom(first + k, 0, label, size=size)).convert(mode).save(
            folder / f"{k:03d}{suffix}"
        )
    return folder


def quiet(f, *a, **k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*a, **k)


def says(text, f, *a, **k):
    with pytest.raises(CxrError, match=text) as e:
        quiet(f, *a, **k)
    assert len(str(e.value).splitlines()) <= 5


def test_one_image(tmp_path):
    says(
        "holds 1 images; at least 2",
        calculate_fid,
        fill(tmp_path / "a", 1),
        fill(tmp_path / "b", 3),
        model=Means(),
    )


def test_empty_and_missing(tmp_path):
    (tmp_path / "a").mkdir()
    says("holds no images", calculate_fid, tmp_path / "a", fill(tmp_path / "b", 3), model=Means())
    says("does not exist", calculate_fid, tmp_path / "nowhere", tmp_path / "b", model=Means())
    says(
        "does not exist",
        create_comparison_grid,
        tmp_path / "nowhere",
        tmp_path / "b",
        save_path=tmp_path / "grid.png",
    )


def test_mixed_sizes_are_named(tmp_path):
    a = fill(tmp_path / "a", 3)
    fill(tmp_path / "c", 1, size=40)
    (tmp_path / "c/000.png").rename(a / "big.png")
    says(
        "big.png is 40 x 40 px, but 000.png is 32 x 32",
        calculate_fid,
        a,
        fill(tmp_path / "b", 3),
        model=Means(),
    )


def test_modes_and_upper_case_suffixes_count(tmp_path):
    a = fill(tmp_path / "a", 2)
    Image.open(a / "000.png").convert("RGB").save(a / "rgb.PNG")
    Image.open(a / "000.png").convert("RGBA").save(a / "rgba.png")
    Image.open(a / "000.png").convert("P").save(a / "p.Png")
    Image.fromarray(np.asarray(Image.open(a / "000.png")).astype(np.uint16) * 257).save(
        a / "deep.png"
    )  # 16 bits
    assert len(image_files(a)) == 6
    x = read_folder(a)
    assert x.shape == (6, 32, 32) and np.abs(x[2:].astype(int) - x[0]).max() <= 1


def test_unreadable_file_is_named(tmp_path):
    a = fill(tmp_path / "a", 3)
    (a / "001.png").write_bytes((a / "001.png").read_bytes()[:60])
    says(
        "cannot read the image .*001.png", calculate_fid, a, fill(tmp_path / "b", 3), model=Means()
    )


def test_remarks_of_a_bare_fid(tmp_path):
    a = fill(tmp_path / "a", 10)
    (a / "notes.txt").write_text("x")
    with pytest.warns(
        UserWarning,
        match="10 real and 10 synthetic images in 16 dimensions.*fewer than 50.*"
        "10 files are in both.*1 files are no images",
    ):
        assert calculate_fid(a, a, model=Means()) == pytest.approx(0, abs=1e-9)


def test_batch_size_changes_nothing(tmp_path):
    a, b = fill(tmp_path / "a", 9), fill(tmp_path / "b", 7, first=50)
    assert quiet(calculate_fid, a, b, batch_size=2, model=Means()) == pytest.approx(
        quiet(calculate_fid, a, b, batch_size=50, model=Means()), rel=1e-6
    )


def test_names_and_order_of_files_change_nothing(tmp_path):
    a = fill(tmp_path / "a", 9)
    b = fill(tmp_path / "b", 7, first=50)
    c = tmp_path / "c"
    c.mkdir()
    for k, p in enumerate(sorted(a.iterdir())):
        (c / f"{99 - k}.PNG").write_bytes(p.read_bytes())
    assert quiet(calculate_fid, c, b, model=Means()) == pytest.approx(
        quiet(calculate_fid, a, b, model=Means()), rel=1e-6
    )


def test_saving_again_as_png_costs_nothing_and_as_jpeg_does(tmp_path):
    a = fill(tmp_path / "a", 20)
    for suffix in ("png", "jpeg"):
        (tmp_path / suffix).mkdir()
        for p in a.iterdir():
            Image.open(p).save(
                tmp_path / suffix / f"{p.stem}.{suffix}",
                **dict(quality=75) if suffix == "jpeg" else dict(compress_level=1),
            )
    f, png, jpeg = (
        extract_features(read_folder(p), size=64) for p in (a, tmp_path / "png", tmp_path / "jpeg")
    )
    assert frechet_distance(f, png) == pytest.approx(0, abs=1e-3) and frechet_distance(f, jpeg) > 1


def test_equal_folders_are_remarked(tmp_path):
    a = fill(tmp_path / "a", 20)
    with pytest.warns(UserWarning, match="20 files are in both"):
        measure_folders(a, a, CFG)


def test_same_value_as_pytorch_fid(tmp_path):
    score = pytest.importorskip("pytorch_fid.fid_score")
    a, b = fill(tmp_path / "a", 40), fill(tmp_path / "b", 45, first=100, suffix=".jpg")
    stats = [
        score.calculate_activation_statistics(sorted(p.iterdir()), Means(), 50, 16, "cpu", 0)
        for p in (a, b)
    ]
    try:
        want = score.calculate_frechet_distance(*stats[0], *stats[1])
    except TypeError as e:
        pytest.skip(f"pytorch-fid 0.3.0 does not work with this scipy: {e}")
    assert quiet(calculate_fid, a, b, model=Means()) == pytest.approx(want, rel=1e-5)


def test_same_activations_as_pytorch_fid_with_its_own_network(
    tmp_path, monkeypatch
):  # random weights in a file of the right name
    inception = pytest.importorskip("pytorch_fid.inception")
    score = pytest.importorskip("pytorch_fid.fid_score")
    from cxr_synth.images.networks import inception_fid

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: net.state_dict())
    torch.manual_seed(0)
    net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for at, block in (
        ("Mixed_5b", inception.FIDInceptionA(192, 32)),
        ("Mixed_5c", inception.FIDInceptionA(256, 64)),
        ("Mixed_5d", inception.FIDInceptionA(288, 64)),
        ("Mixed_6b", inception.FIDInceptionC(768, 128)),
        ("Mixed_6c", inception.FIDInceptionC(768, 160)),
        ("Mixed_6d", inception.FIDInceptionC(768, 160)),
        ("Mixed_6e", inception.FIDInceptionC(768, 192)),
        ("Mixed_7b", inception.FIDInceptionE_1(1280)),
        ("Mixed_7c", inception.FIDInceptionE_2(2048)),
    ):
        setattr(net, at, block)
    torch.save(net.state_dict(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    a = fill(tmp_path / "a", 2, size=48)
    want = score.get_activations(
        sorted(a.iterdir()), inception.InceptionV3([3]), 50, 2048, "cpu", 0
    )
    loaded = inception_fid(tmp_path)
    assert folder_activations(a, loaded.net.net, 50, "cpu") == pytest.approx(
        want, rel=1e-5, abs=1e-6
    )
    assert extract_features(
        read_folder(a), "inception-fid", weights=str(tmp_path)
    ) == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert loaded.head[0].shape == (1008, 2048)


# -- the suite on folders

CFG = QualityConfig(size=32, halvings=3, pairs=30, device="cpu")


def test_classes_missing_on_one_side(tmp_path):
    fill(tmp_path / "real/NORMAL", 14)
    fill(tmp_path / "real/PNEUMONIA", 14, label=1)
    fill(tmp_path / "synth/normal", 14)
    says(
        "the class pneumonia is only in .*real",
        measure_folders,
        tmp_path / "real",
        tmp_path / "synth",
        CFG,
    )


def test_few_images_are_labelled(tmp_path):
    says(
        "holds 3 images; at least 12",
        measure_folders,
        fill(tmp_path / "a", 3),
        fill(tmp_path / "b", 20),
        CFG,
    )
    t = measure_folders(fill(tmp_path / "c", 40), fill(tmp_path / "d", 20, first=500), CFG)
    assert "within the floor" not in {*t.verdict} and {
        "real_available",
        "synthetic_available",
        "unused_files",
    } <= {*t}


def test_mixed_sizes_take_one_path(tmp_path):
    a = fill(tmp_path / "a", 20)
    fill(a, 4, first=900, size=50, suffix=".JPEG")
    (a / "notes.txt").write_text("x")
    t = measure_folders(a, fill(tmp_path / "b", 20, first=500), CFG)
    assert (t.real_available == 24).all() and (t.unused_files == 1).all()


def test_similarity_is_that_of_the_stage(tmp_path):
    "Folders once gave the mean over halves in place of the mean over all pairs."
    real, synthetic = fill(tmp_path / "a", 40), fill(tmp_path / "b", 20, first=500)
    table = measure_folders(real, synthetic, CFG).set_index("metric")
    n = int(table.n_synthetic["ms-ssim"])
    whole, _ = set_similarity(read_folder(synthetic), n, CFG.pairs, CFG.halvings)
    assert table.value["ms-ssim"] == pytest.approx(whole[0], abs=1e-6)
    assert table.value["ms-ssim-top"] == pytest.approx(whole[1], abs=1e-6)
    assert table.resize["ms-ssim"] == "32 px enlarged to 256 px, bilinear"
