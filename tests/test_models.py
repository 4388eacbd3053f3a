"Beside the notebooks: the Hub's cache, an autoencoder without posterior, what is refused and why."

import json, shutil
from pathlib import Path

import huggingface_hub, numpy as np, pytest, torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.families import FAMILIES, find_family, known_parts
from cxr_synth.diffusion.hub import check_source, source_hashes
from cxr_synth.diffusion.dreambooth import class_task, fine_tune
from cxr_synth.diffusion.lora import (
    LORA_FILE,
    add_lora,
    base_signature,
    check_lora,
    load_lora,
    save_lora,
)
from cxr_synth.diffusion.pipelines import fuse, load_pipeline, round_trip, save_pipeline
from cxr_synth.diffusion.preflight import preflight
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(hub, repo, source, wanted=lambda p: True):
    "Put files of a folder into a Hub cache as if they had been downloaded at COMMIT of main."
    root = hub / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    for p in source.rglob("*"):
        if p.is_file() and wanted(p):
            to = root / "snapshots" / COMMIT / p.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, to)


def said(f, *args) -> str:
    with pytest.raises(CxrError) as e:
        f(*args, local_files_only=True)
    return str(e.value)


def test_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    pipe = tiny_pipeline(tmp_path / "tok", PROMPTS.values(), 32)
    save_pipeline(pipe, tmp_path / "base")
    (tmp_path / "xl").mkdir()
    (tmp_path / "xl/model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline"})
    )
    cached(tmp_path / "hub", "me/mini", tmp_path / "base")
    cached(tmp_path / "hub", "me/xl", tmp_path / "xl")
    cached(tmp_path / "hub", "me/half", tmp_path / "base", lambda p: p.suffix != ".safetensors")
    for revision in (None, "main", COMMIT):
        assert check_source("me/mini", revision, True).revision == COMMIT
    assert len(source_hashes(check_source("me/mini", None, True))) > 8
    loaded = load_pipeline("me/mini", local_files_only=True)
    for a, b in zip(loaded.unet.parameters(), pipe.unet.parameters()):
        assert torch.equal(a, b)
    assert "Stable Diffusion XL" in said(check_source, "me/xl")
    assert check_source("me/half", None, True).where == "me/half"  # only configuration there
    assert "cannot load the model me/half" in said(load_pipeline, "me/half")
    for source, revision in (("me/gone", None), ("me/mini", "no-such-branch")):
        message = said(check_source, source, revision)
        assert "not on this machine" in message and "sd21-base" in message


def test_autoencoder_without_posterior(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tok", PROMPTS.values(), 32)
    width = (16, 16, 16)
    pipe.register_modules(
        vae=AutoencoderTiny(
            encoder_block_out_channels=width,
            decoder_block_out_channels=width,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
        )
    )
    save_pipeline(pipe, tmp_path / "base")
    loaded = load_pipeline(tmp_path / "base")
    assert type(loaded.vae).__name__ == "AutoencoderTiny" and loaded.vae_scale_factor == 4
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    assert round_trip(loaded.vae, images).shape == images.shape
    need = preflight(TrainConfig(base=str(tmp_path / "base"), train_batch_size=2), 32)
    assert 0 < need["memory"]["activations"] < 1 and need["disk"]["download"] == 0


def test_inpainting_and_pickles_are_refused(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tok", PROMPTS.values(), 32)
    save_pipeline(pipe, tmp_path / "base")
    config = tmp_path / "base/unet/config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | dict(in_channels=9)))
    with pytest.raises(CxrError, match="9 input channels.*inpainting"):
        load_pipeline(tmp_path / "base")
    config.write_text(good)
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CxrError, match=r"lacks unet/\*\.safetensors"):
        load_pipeline(tmp_path / "base")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline(root / "tok", PROMPTS.values(), 32)
    save_pipeline(pipe, root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def pipe(base):
    return load_pipeline(base)


@pytest.mark.parametrize(
    "kind, extra, name",
    [
        ("StableDiffusionXLPipeline", {}, "Stable Diffusion XL"),
        ("StableDiffusionXLImg2ImgPipeline", {}, "Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", {}, "Stable Diffusion 3"),
        ("FluxPipeline", {}, "FLUX"),
        ("FooPipeline", {}, r"another family \(FooPipeline\)"),
        ("StableDiffusionPipeline", {"text_encoder_2": []}, "another family"),
        ("StableDiffusionPipeline", {"transformer": []}, "another family"),
    ],
)
def test_other_families_are_refused(kind, extra, name):
    with pytest.raises(CxrError, match=f"mine is a pipeline of {name}.*Stable Diffusion 1 and 2"):
        find_family({"_class_name": kind} | extra, "mine")


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_the_family(kind):
    assert find_family({"_class_name": kind}, "mine") is FAMILIES["Stable Diffusion"]


@pytest.mark.parametrize("name", ["sd-of-next-year", "tiny", "laptop"])
def test_sizes_are_known_for_downloaded_bases_only(name):
    with pytest.raises(CxrError, match="Allowed: sd21-base, sd15"):
        known_parts(name)


@pytest.mark.parametrize(
    "source, message",
    [
        ("no/where/at/all", "neither a folder that exists nor a Hub id"),
        ("nowhere", "neither a folder that exists nor a Hub id"),
        ("tiny", "trains it from nothing"),
        ("laptop", "trains it from nothing"),
        ("runwayml/stable-diffusion-v1-5", "left the Hub.*\n.*sd15"),
        ("tokenizer", "no model_index.json"),
    ],
)
def test_sources_that_are_none(base, source, message):
    source = base / source if source == "tokenizer" else source
    with pytest.raises(CxrError, match=message):
        check_source(source, local_files_only=True)


def test_a_folder_wins_over_a_name(base, tmp_path, monkeypatch):
    "A local copy is used even if its path reads like a Hub id that has gone, or like a base's name."
    monkeypatch.chdir(tmp_path)
    for name in ("stabilityai/stable-diffusion-2-1-base", "sd15"):
        shutil.copytree(base, name)
        assert check_source(name).where == name
    assert preflight(TrainConfig(base="sd15", train_batch_size=1), 32)["total"] < 10


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(rank=0), "rank 0 is not possible"),
        (dict(rank=1.5), "rank 1.5 is not possible"),
        (dict(rank=4, alpha=0), "alpha 0 is not possible"),
        (dict(rank=4, targets=["to_q", "to_kk"]), "no layer is called to_kk"),
    ],
)
def test_loras_that_are_impossible(pipe, request_, message):
    with pytest.raises(CxrError, match=message):
        add_lora(pipe.unet, None, **request_)


@pytest.mark.parametrize(
    "state, facts, message",
    [
        (
            {"text_encoder.block.9.q_proj.lora.down.weight": (4, 64)},
            {},
            "no layer .* text_encoder.block.9",
        ),
        ({"vae.conv.lora.down.weight": (4, 64)}, {}, "no layer of this pipeline takes up vae.conv"),
        (
            {"unet.mid_block.attentions.0.proj_in.lora.down.weight": (4, 9, 1, 1)},
            {},
            "is for 9 inputs",
        ),
        ({}, dict(parts=["text_encoder"]), "should hold LoRA weights of the text_encoder"),
        (
            {},
            dict(signature=[0.5] * 16, base="another"),
            "is a LoRA for another; the weights .* are others",
        ),
    ],
)
def test_loras_that_do_not_belong(pipe, state, facts, message):
    weights = {name: torch.zeros(shape) for name, shape in state.items()}
    if facts:
        facts = dict(signature=base_signature(pipe.unet)) | facts
    with pytest.raises(CxrError, match=message):
        check_lora(pipe, weights, facts, "lora")


def test_a_second_lora_is_refused(base, tmp_path):
    pipe = load_pipeline(base)
    with pytest.raises(CxrError, match=f"has no {LORA_FILE}"):
        load_lora(pipe, base)
    add_lora(pipe.unet, None, rank=2)
    with pytest.raises(CxrError, match="carries a LoRA already"):
        add_lora(pipe.unet, None, rank=2)
    (tmp_path / LORA_FILE).write_bytes(b"")
    with pytest.raises(CxrError, match="carries a LoRA already"):
        load_lora(pipe, tmp_path)


def published_text_encoder(layers) -> set:
    "The names in the text encoder's file of the published Stable Diffusion 2.1, for so many layers."
    each = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    each += [f"self_attn.{p}_proj" for p in "kvq"] + ["self_attn.out_proj"]
    names = [f"encoder.layers.{k}.{m}" for k in range(layers) for m in each] + ["final_layer_norm"]
    embeddings = [f"embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
    return {f"text_model.{n}.{w}" for n in names for w in ("weight", "bias")} | {
        f"text_model.{name}" for name in embeddings
    }


def write_short_names(monkeypatch):
    "Let transformers save as some of its versions do: without `text_model.`."
    real = CLIPTextModel.save_pretrained

    def save(self, folder, *args, **kw):
        real(self, folder, *args, **kw)
        path = Path(folder) / "model.safetensors"
        state = {name.removeprefix("text_model."): w for name, w in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})

    monkeypatch.setattr(CLIPTextModel, "save_pretrained", save)


@pytest.mark.parametrize("how", ["trained", "saved", "fused"])
def test_full_models_have_the_published_names(tmp_path, monkeypatch, how):
    "Other names are filled with random weights by transformers 5.0 to 5.5, without a word."
    write_short_names(monkeypatch)
    save_pipeline(tiny_pipeline(tmp_path / "tok", PROMPTS.values(), 32), tmp_path / "base")
    folder, pipe = tmp_path / "model", load_pipeline(tmp_path / "base")
    if how == "saved":
        save_pipeline(pipe, folder)
    if how == "fused":
        add_lora(pipe.unet, pipe.text_encoder, 2)
        save_lora(tmp_path / "lora", pipe.unet, pipe.text_encoder, tmp_path / "base", 2)
        fuse(tmp_path / "lora", folder)
    if how == "trained":
        few = dict(max_train_steps=1, train_batch_size=2, heldout_images=None, preview_steps=None)
        cfg = TrainConfig(base=str(tmp_path / "base"), device="cpu", **few)
        task = class_task(np.zeros((2, 32, 32), np.uint8), PROMPTS["normal"])
        fine_tune(str(tmp_path / "base"), task, folder, tmp_path / "c.pt", cfg)
    files = list((folder / "text_encoder").glob("*.safetensors"))
    assert [file.name for file in files] == ["model.safetensors"]
    with safe_open(files[0], "pt") as f:
        assert set(f.keys()) - {"text_model.embeddings.position_ids"} == published_text_encoder(2)
    assert load_pipeline(folder).text_encoder.config.num_hidden_layers == 2
