"The guide's protocol on folders: what it refuses, and that its numbers are made once."

import numpy as np, pytest, torch
from PIL import Image
from cxr_synth.base.files import CxrError
from cxr_synth.base.records import Study
from cxr_synth.base.settings import GuideConfig
from cxr_synth.guide import (
    ChestXrayDataset,
    PneumoniaClassifier,
    TwoLogits,
    run_all_experiments,
    stage_guide,
    train_classifier,
)


@pytest.fixture
def folders(tmp_path):
    "Four images of each class in `real` and `test`, each of its own grey."
    found = {}
    for k, side in enumerate(("real", "test")):
        for label, name in enumerate(("normal", "pneumonia")):
            folder = tmp_path / side / name
            folder.mkdir(parents=True)
            for i in range(4):
                grey = np.full((8, 8), 100 * k + 50 * label + i, np.uint8)
                Image.fromarray(grey).save(folder / f"{side}{label}{i}.png")
        found[side] = {name: tmp_path / side / name for name in ("normal", "pneumonia")}
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(real_dirs={"healthy": "."}), "Allowed: normal, pneumonia"),
        (dict(real_dirs={"normal": "nowhere"}), "holds no images"),
        (dict(real_dirs={"normal": "."}, real_ratio=2), "real_ratio 2 is not possible"),
        (dict(synthetic_dirs={"normal": "."}, synthetic_ratio=-1), "synthetic_ratio -1 is not"),
    ],
)
def test_impossible_data_sets_are_refused(arguments, message):
    with pytest.raises(CxrError, match=message):
        ChestXrayDataset(**arguments)


def test_a_damaged_image_names_its_file(folders):
    (folders["real"]["normal"] / "real00.png").write_bytes(b"no image")
    images = ChestXrayDataset(folders["real"])
    with pytest.raises(CxrError, match=r"cannot read the image .*real00\.png"):
        [images[i] for i in range(len(images))]


def test_seeds_repeated_and_weights_that_are_not_there(folders, tmp_path):
    with pytest.raises(CxrError, match="seeds repeated"):
        run_all_experiments(folders["real"], {}, folders["test"], tmp_path / "out", seeds=(1, 1))
    with pytest.raises(CxrError, match=r"densenet121-a639ec97\.pth"):
        PneumoniaClassifier(weights=tmp_path)


def test_an_output_over_its_sources_is_refused(folders):
    inside = folders["real"]["normal"]
    with pytest.raises(CxrError):
        run_all_experiments(folders["real"], {}, folders["test"], inside)
    assert len(list(inside.iterdir())) == 4


def test_a_validation_loader_of_one_class(tmp_path):
    one_class = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(CxrError, match="holds 2 images of one class"):
        train_classifier(
            TwoLogits("small_cnn", 32), one_class, one_class, 1, 1e-3, "cpu", tmp_path / "best.pth"
        )


def test_the_stage_waits_for_the_test(tmp_path):
    with pytest.raises(CxrError, match="still sealed"):
        stage_guide(Study(tmp_path), GuideConfig(device="cpu"))
