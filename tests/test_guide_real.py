"""The guide's cells of sections 10 and 11 on folders of real films, as the guide calls them; the
network and the number of epochs are small.
"""

import os
from pathlib import Path

import numpy as np, pytest, torch
from torch.utils.data import DataLoader
import cxr_synth
from cxr_synth.classify.finetune import Classifier

REAL = (
    Path(os.environ.get("CXR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    / "kermany-224"
)
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(),
    reason=f"no real data set in {REAL.parent}: set CXR_DATA to the folder of kermany-224",
)
CLASSES = dict(normal="NORMAL", pneumonia="PNEUMONIA")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The guide's data/: real, test and (real films of other children in their place) synthetic, a
    few of each, as links.
    """
    root = tmp_path_factory.mktemp("data")

    def some(part, split, first, n):
        for name, folder in CLASSES.items():
            (root / part / name).mkdir(parents=True)
            for p in sorted((REAL / split / folder).iterdir())[first : first + n]:
                os.symlink(p, root / part / name / p.name)
        return {name: str(root / part / name) for name in CLASSES}

    return dict(
        real=some("real", "train", 0, 60),
        synthetic=some("synthetic", "train", 600, 60),
        test=some("test", "test", 0, 30),
    )


class Small(torch.nn.Module):
    "A network that learns in seconds, with the guide's two answers."

    def __init__(self):
        super().__init__()
        self.net = Classifier("small_cnn", 32, False)

    def forward(self, x):
        z = self.net(x.mean(1, keepdim=True))
        return torch.stack([-z, z], 1)


def test_section_10(folders, tmp_path):
    train = cxr_synth.ChestXrayDataset(
        real_dirs=folders["real"],
        synthetic_dirs=folders["synthetic"],
        real_ratio=1.0,
        synthetic_ratio=0.5,
        transform=cxr_synth.get_transforms(train=True),
    )
    test = cxr_synth.ChestXrayDataset(
        real_dirs=folders["test"], transform=cxr_synth.get_transforms(train=False)
    )
    assert len(train) == 120 + 60 and tuple(train[0][0].shape) == (3, 224, 224)
    model = cxr_synth.PneumoniaClassifier(pretrained=False)
    assert (
        cxr_synth.count_parameters(model) == 7_479_682
    )  # DenseNet-121 without its head, and 1024-512-2
    two = (
        torch.utils.data.Subset(train, range(0, 180, 45)),
        torch.utils.data.Subset(test, range(0, 60, 15)),
    )
    history, best = cxr_synth.train_classifier(
        model,
        *(DataLoader(d, batch_size=4) for d in two),
        num_epochs=1,
        device="cpu",
        save_path=tmp_path / "best.pth",
    )
    assert {len(v) for v in history.values()} == {1} and best == max(history["val_acc"])


def test_section_11(folders, tmp_path, capsys):
    results = cxr_synth.run_all_experiments(
        folders["real"],
        folders["synthetic"],
        folders["test"],
        str(tmp_path / "results"),
        num_epochs=3,
        size=32,
        batch_size=16,
        num_workers=0,
        model=Small,
        device="cpu",
    )
    assert list(results) == [
        "baseline",
        "synth_25",
        "synth_50",
        "synth_100",
        "limited_10",
        "limited_25",
        "synth_only",
    ]
    assert all(
        len(r["all_accuracies"]) == 3
        and np.isclose(r["accuracy_mean"], np.mean(r["all_accuracies"]))
        for r in results.values()
    )
    assert all(
        a >= b for r in results.values() for a, b in zip(r["all_accuracies"], r["last_accuracies"])
    )  # what choosing on the test gives away
    cxr_synth.analyze_and_print_results(results)
    said = capsys.readouterr().out
    assert "FINAL RESULTS SUMMARY" in said and "paired by seed" in said
