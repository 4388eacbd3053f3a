"The guide's functions called with what cannot be: each says which argument, and writes nothing."

import math

import numpy as np
import pytest
import torch
from PIL import Image

import cxr_synth
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS
from cxr_synth.diffusion.command import parse_command
from cxr_synth.diffusion.pipelines import save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

NAN, INF = math.nan, math.inf
NO_COUNT = [0, -1, 1.5, NAN, INF, "8", None, True, [8]]
NO_RATE = [0, -1, NAN, INF, "fast", None, True]
NO_PATH = ["", " ", None, 7, ["a"], "a\0b"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with films of both classes, an empty folder, a text, a small model."
    root = tmp_path_factory.mktemp("place")
    for side in ("real", "synthetic", "test"):
        for cls in ("normal", "pneumonia"):
            (root / side / cls).mkdir(parents=True)
            for k in range(3):
                chance = np.random.default_rng(len(side) * 100 + len(cls) * 10 + k)
                noise = chance.integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(noise).save(root / side / cls / f"{side}{k}.png")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no image")
    save_pipeline(tiny_pipeline(root / "tok", PROMPTS.values(), 32), root / "base")
    return root


def files(root):
    return set(root.rglob("*"))


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.last(x.mean((2, 3)))


def loader():
    return [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]


def dirs(place, side):
    return {c: str(place / side / c) for c in ("normal", "pneumonia")}


GOOD = {  # name -> (place) -> arguments that work
    "prepare_training_data": lambda p: dict(
        dataset=dict(train=[dict(image=Image.new("L", (8, 8)), label=0)]), output_dir=p / "new"
    ),
    "generate_class_images": lambda p: dict(
        num_images=1, output_dir=p / "new", prompt="an xray", base=str(p / "base"), steps=1
    ),
    "train_dreambooth": lambda p: dict(
        pretrained_model_name_or_path=str(p / "base"),
        instance_data_dir=str(p / "real/normal"),
        output_dir=p / "new",
        instance_prompt="a chest xray",
        resolution=32,
        max_train_steps=1,
        train_batch_size=1,
    ),
    "load_finetuned_model": lambda p: dict(model_path=str(p / "base"), device="cpu"),
    "generate_synthetic_dataset": lambda p: dict(
        pipe=cxr_synth.load_finetuned_model(p / "base", "cpu"),
        prompt="a chest xray",
        num_images=1,
        output_dir=p / "new",
    ),
    "calculate_fid": lambda p: dict(
        real_path=p / "real/normal", synthetic_path=p / "test/normal", model=Small()
    ),
    "create_comparison_grid": lambda p: dict(
        real_dir=p / "real/normal", synth_dir=p / "test/normal", save_path=p / "new.png"
    ),
    "ChestXrayDataset": lambda p: dict(real_dirs=dirs(p, "real")),
    "get_transforms": lambda p: {},
    "PneumoniaClassifier": lambda p: dict(pretrained=False),
    "count_parameters": lambda p: dict(model=Small()),
    "train_classifier": lambda p: dict(
        model=Small(), train_loader=loader(), val_loader=loader(), num_epochs=1, device="cpu",
        save_path=p / "new.pth",
    ),
    "run_all_experiments": lambda p: dict(
        real_dirs=dirs(p, "real"), synthetic_dirs=dirs(p, "synthetic"), test_dirs=dirs(p, "test"),
        output_dir=p / "new", num_epochs=1, seeds=[1], model=Small, size=8, num_workers=0,
    ),
}  # fmt: skip


def several(name, argument, values):
    return [(name, argument, value) for value in values]


def one_result(**changes):
    good = dict(
        accuracy_mean=0.9, accuracy_std=0.1, f1_mean=0.9, f1_std=0.1, auc_mean=0.9, auc_std=0.1
    )
    return {"baseline": good | dict(all_accuracies=[0.9, 0.8]) | changes}


FOLDERS = ["nowhere", "empty", "notes.txt"]
BAD_DIRS = [None, 7, "real", [], {}, {"normal": 7}, {"sick": "real"}, {"normal": ""}, {1: "a"}]
CASES = [
    *several("prepare_training_data", "dataset", [None, 7, [], {}, {"test": []}, {"train": []}]),
    *several("prepare_training_data", "dataset", [{"train": [v]} for v in (7, {}, {"image": 1})]),
    *several("prepare_training_data", "output_dir", NO_PATH),
    *several("prepare_training_data", "target_size", NO_COUNT),
    *several("prepare_training_data", "workers", NO_COUNT),
    *several("generate_class_images", "num_images", NO_COUNT),
    *several("generate_class_images", "steps", NO_COUNT),
    *several("generate_class_images", "batch_size", NO_COUNT),
    *several("generate_class_images", "guidance_scale", [-1, NAN, INF, "7", None]),
    *several("generate_class_images", "output_dir", NO_PATH),
    *several("generate_class_images", "device", ["gpu", "", None, 7]),
    *several("generate_class_images", "base", ["", None, 7, *FOLDERS]),
    *several("train_dreambooth", "resolution", [*NO_COUNT, 33]),
    *several("train_dreambooth", "max_train_steps", NO_COUNT),
    *several("train_dreambooth", "train_batch_size", NO_COUNT),
    *several("train_dreambooth", "gradient_accumulation_steps", NO_COUNT),
    *several("train_dreambooth", "learning_rate", NO_RATE),
    *several("train_dreambooth", "rank", [0, -4, 1.5, "4", True]),
    *several("train_dreambooth", "seed", [-1, 1.5, "x", None]),
    *several("train_dreambooth", "output_dir", NO_PATH),
    *several("train_dreambooth", "instance_data_dir", [*NO_PATH, *FOLDERS]),
    *several("train_dreambooth", "heldout_data_dir", FOLDERS),
    *several("train_dreambooth", "pretrained_model_name_or_path", [*NO_PATH, *FOLDERS]),
    *several("train_dreambooth", "train_text_encoder", ["yes", 2]),
    *several("train_dreambooth", "magic", [1]),
    *several("load_finetuned_model", "model_path", [*NO_PATH, *FOLDERS, "real/normal", "new.pth"]),
    *several("load_finetuned_model", "device", ["gpu", "", None]),
    *several("load_finetuned_model", "mixed_precision", ["half", "", None, 16]),
    *several("generate_synthetic_dataset", "pipe", [None, "base", 7, Small()]),
    *several("generate_synthetic_dataset", "num_images", NO_COUNT),
    *several("generate_synthetic_dataset", "batch_size", NO_COUNT),
    *several("generate_synthetic_dataset", "num_inference_steps", NO_COUNT),
    *several("generate_synthetic_dataset", "guidance_scale", [-1, NAN, INF, 1e6, "7", None]),
    *several("generate_synthetic_dataset", "output_dir", NO_PATH),
    *several("calculate_fid", "real_path", [*NO_PATH, *FOLDERS]),
    *several("calculate_fid", "synthetic_path", [*NO_PATH, *FOLDERS]),
    *several("calculate_fid", "batch_size", NO_COUNT),
    *several("calculate_fid", "model", ["inception", 7]),
    *several("create_comparison_grid", "real_dir", [*NO_PATH, *FOLDERS]),
    *several("create_comparison_grid", "synth_dir", [*NO_PATH, *FOLDERS]),
    *several("create_comparison_grid", "num_samples", NO_COUNT),
    *several("create_comparison_grid", "save_path", [*NO_PATH, "grid.docx", "grid.xyz"]),
    *several("ChestXrayDataset", "real_dirs", [d for d in BAD_DIRS if d]),
    *several("ChestXrayDataset", "real_dirs", [{"normal": f} for f in FOLDERS]),
    *several("ChestXrayDataset", "real_ratio", [-0.1, 1.1, NAN, INF, "all", None]),
    *several("ChestXrayDataset", "synthetic_ratio", [-0.1, 1.1, NAN, INF, "all", None]),
    *several("ChestXrayDataset", "transform", [7, "resize"]),
    *several("ChestXrayDataset", "seed", [-1, 1.5, "x", None]),
    *several("get_transforms", "size", NO_COUNT),
    *several("PneumoniaClassifier", "num_classes", NO_COUNT),
    *several("PneumoniaClassifier", "weights", [7, "", ["a"]]),
    *several("count_parameters", "model", [None, 7, "model", [1], {}]),
    *several("train_classifier", "model", [None, 7, "model"]),
    *several("train_classifier", "train_loader", [None, 7, []]),
    *several("train_classifier", "val_loader", [None, 7, []]),
    *several("train_classifier", "num_epochs", NO_COUNT),
    *several("train_classifier", "learning_rate", NO_RATE),
    *several("train_classifier", "device", ["gpu", "", None]),
    *several("train_classifier", "save_path", NO_PATH),
    *several("run_all_experiments", "real_dirs", BAD_DIRS),
    *several("run_all_experiments", "test_dirs", [*BAD_DIRS, {"normal": "real/normal"}]),
    *several("run_all_experiments", "num_epochs", NO_COUNT),
    *several("run_all_experiments", "batch_size", NO_COUNT),
    *several("run_all_experiments", "num_workers", [-1, 1.5, "4", None]),
    *several("run_all_experiments", "seeds", [None, 7, "42", [], [1.5], ["a"], [-1], [1, 1]]),
    *several("run_all_experiments", "size", NO_COUNT),
    *several("run_all_experiments", "model", [7, "densenet121"]),
    *several("run_all_experiments", "device", ["gpu", "", None]),
    *several("run_all_experiments", "output_dir", NO_PATH),
]


@pytest.mark.parametrize("name, argument, value", CASES)
def test_a_bad_argument(place, monkeypatch, name, argument, value):
    monkeypatch.chdir(place)
    before = files(place)
    arguments = GOOD[name](place) | {argument: value}
    with pytest.raises(CxrError) as e:
        getattr(cxr_synth, name)(**arguments)
    text = str(e.value)
    assert 1 < len(text.splitlines()) <= 5, text
    assert files(place) == before


@pytest.mark.parametrize(
    "results",
    [
        None,
        7,
        [],
        {},
        {"synth_25": {}},
        {"baseline": None},
        {"baseline": {}},
        one_result(accuracy_mean=NAN),
        one_result(accuracy_mean="0.9"),
        one_result(auc_std=None),
        one_result(f1_mean=-1),
        one_result(all_accuracies=[]),
        one_result(all_accuracies=0.9),
        one_result(all_accuracies=[0.9, NAN]),
        one_result(all_accuracies=["a"]),
    ],
)
def test_results_that_are_none(results, capsys):
    with pytest.raises(CxrError):
        cxr_synth.analyze_and_print_results(results)
    assert not capsys.readouterr().out


def test_results_that_are(capsys):
    cxr_synth.analyze_and_print_results(one_result())
    assert "baseline" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["get_transforms", "count_parameters", "ChestXrayDataset", "train_classifier"]
)
def test_good_arguments_work(place, tmp_path, name):
    arguments = GOOD[name](place)
    if "save_path" in arguments:
        arguments["save_path"] = tmp_path / "best.pth"
    assert getattr(cxr_synth, name)(**arguments) is not None


@pytest.mark.parametrize(
    "command, word",
    [
        ("accelerate launch train.py --resolution=big", "resolution"),
        ("accelerate launch train.py --learning_rate=fast", "learning_rate"),
        ("accelerate launch train.py --max_train_steps=1.5", "max_train_steps"),
        ("accelerate launch train.py --train_text_encoder=perhaps", "train_text_encoder"),
        ('accelerate launch train.py --instance_prompt="a chest', "quotation"),
        ("accelerate launch train.py --resolution", "resolution"),
        ("accelerate launch train.py --magic=1", "magic"),
    ],
)
def test_a_command_that_cannot_be_read(command, word):
    with pytest.raises(CxrError, match=word):
        parse_command(command)


@pytest.mark.parametrize("kind", ["base itself", "holds the base", "in the base", "class images"])
def test_no_model_is_written_where_something_is_read(place, monkeypatch, kind):
    monkeypatch.chdir(place)
    out = {"base itself": "base", "holds the base": ".", "in the base": "base/new"}
    flags = GOOD["train_dreambooth"](place) | dict(output_dir=out.get(kind, "test/normal"))
    flags |= dict(class_data_dir="test/normal", with_prior_preservation=True, class_prompt="xray")
    before = {p: p.read_bytes() for p in files(place) if p.is_file()}
    with pytest.raises(CxrError, match="one lies in the other"):
        cxr_synth.train_dreambooth(**flags)
    assert {p: p.read_bytes() for p in files(place) if p.is_file()} == before
