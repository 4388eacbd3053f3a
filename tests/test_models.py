"What a notebook cannot show: the Hub's cache, and a pipeline whose autoencoder has no posterior."

import json, shutil
import huggingface_hub, pytest, torch
from diffusers import AutoencoderTiny
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.hub import check_source, source_hashes
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
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
    assert check_source(
        "me/half", None, True
    ).where == "me/half" and "cannot load the model me/half" in said(
        load_pipeline, "me/half"
    )  # only configuration there
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
