"A decoder tuned on a generator's own patients: the encoder stays, a stopped run goes on, every model has it."

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file, save_file

from cxr_synth.base.files import CxrError
from cxr_synth.base.loop import Loop
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import PRESETS, DataConfig, TrainConfig
from cxr_synth.diffusion.command import guide_flags
from cxr_synth.diffusion.decoder import DECODER_FILE, decoder_facts, load_decoder, save_decoder
from cxr_synth.diffusion.generator import model_of, train_generator
from cxr_synth.diffusion.pipelines import load_pipeline, round_trip
from cxr_synth.diffusion.small_pipeline import tiny_vae
from cxr_synth.diffusion.trainer import latents_key
from cxr_synth.diffusion.tuned_decoder import tune_decoder
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.images.study_images import training_rows
from cxr_synth.stages.data import stage_data

CFG = TrainConfig(
    tune_decoder=6,
    decoder_batch_size=4,
    decoder_learning_rate=1e-3,
    checkpoint_steps=2,
    device="cpu",
)
FILMS = np.stack([draw_phantom(k, 0, k % 2, size=32) for k in range(12)])


def kl():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vae().eval()


def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    torch.nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)  # grey, not beyond black
    return vae.eval()


def encoder_of(vae):
    state = vae.state_dict()
    return {n: w.clone() for n, w in state.items() if not n.startswith("decoder.")}


@pytest.mark.parametrize("make", [kl, tiny])
def test_the_encoder_keeps_its_bytes(make, tmp_path):
    vae = make()
    before, key, trip = encoder_of(vae), latents_key(vae), round_trip(vae, FILMS)
    facts = tune_decoder(vae, FILMS, tmp_path / "d.safetensors", tmp_path / "d.pt", CFG, 0, FILMS)
    after = encoder_of(vae)
    assert all(torch.equal(before[n], after[n]) for n in before) and len(before) == len(after)
    assert latents_key(vae) == key
    assert facts["grey_levels"][1] < facts["grey_levels"][0]
    assert (round_trip(vae, FILMS) != trip).any()
    other = make()
    load_decoder(other, tmp_path / "d.safetensors")
    assert np.array_equal(round_trip(other, FILMS), round_trip(vae, FILMS))
    assert facts == decoder_facts(tmp_path / "d.safetensors")


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    tune_decoder(kl(), FILMS, tmp_path / "a.safetensors", tmp_path / "a.pt", CFG)
    take = Loop.take_step

    def stop(loop, *args):
        if loop.step == 4:
            raise KeyboardInterrupt
        take(loop, *args)

    monkeypatch.setattr(Loop, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        tune_decoder(kl(), FILMS, tmp_path / "b.safetensors", tmp_path / "b.pt", CFG)
    monkeypatch.undo()
    assert not (tmp_path / "b.safetensors").exists()
    begun = []
    run = Loop.run
    monkeypatch.setattr(Loop, "run", lambda loop, *a: begun.append(loop.step) or run(loop, *a))
    tune_decoder(kl(), FILMS, tmp_path / "b.safetensors", tmp_path / "b.pt", CFG)
    assert begun == [4]
    a, b = ((tmp_path / f"{x}.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_another_run_is_refused(tmp_path):
    tune_decoder(kl(), FILMS, tmp_path / "a.safetensors", tmp_path / "a.pt", CFG)
    for cfg, films in (
        (dataclasses.replace(CFG, decoder_learning_rate=1e-4), FILMS),
        (CFG, FILMS[::-1]),
    ):
        with pytest.raises(CxrError, match="other settings"):
            tune_decoder(kl(), films, tmp_path / "c.safetensors", tmp_path / "a.pt", cfg)


def test_bad_input(tmp_path):
    file, path = tmp_path / "a.safetensors", tmp_path / "a.pt"
    with pytest.raises(CxrError, match="without films"):
        tune_decoder(kl(), FILMS[:0], file, path, CFG)
    with pytest.raises(CxrError, match="divisible by 4"):
        tune_decoder(kl(), FILMS[:, :30, :30], file, path, CFG)
    with pytest.raises(CxrError, match="tune-decoder -1 is not possible"):
        TrainConfig(tune_decoder=-1)
    assert not file.exists()


def test_the_same_decoder_is_the_same_file(tmp_path):
    vae, files = kl(), [tmp_path / f"{k}.safetensors" for k in range(8)]
    for file in files:
        save_decoder(vae, file, dict(steps=1, films=2))
    assert len({file.read_bytes() for file in files}) == 1


def test_damaged_files_are_refused_and_change_nothing(tmp_path):
    vae, file = kl(), tmp_path / DECODER_FILE
    save_decoder(vae, file, dict(steps=1))
    before = {n: w.clone() for n, w in vae.state_dict().items()}
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CxrError, match="cannot be read as weights"):
        load_decoder(vae, file)
    file.write_bytes(whole)
    state = load_file(file)
    state["conv_out.bias"][0] = torch.nan
    save_file(state, file)
    with pytest.raises(CxrError, match="NaN or infinity"):
        load_decoder(vae, file)
    with pytest.raises(CxrError, match="not written by save_decoder"):
        decoder_facts(file)
    del state["conv_out.bias"]
    save_file(state, file)
    with pytest.raises(CxrError, match="another autoencoder"):
        load_decoder(vae, file)
    assert all(torch.equal(w, before[n]) for n, w in vae.state_dict().items())


def test_the_guides_presets_leave_the_decoder_alone():
    for preset in PRESETS.values():
        cfg = TrainConfig(**preset.get("train", {}))
        assert cfg.tune_decoder == 0 and "tune_decoder" not in cfg.settings()
    assert CFG.settings()["tune_decoder"] == 6


def test_one_class_alone_gets_no_decoder():
    need = dict(pretrained_model_name_or_path="base", instance_data_dir="films", output_dir="out")
    with pytest.raises(CxrError, match="tell the classes apart"):
        guide_flags(need | dict(instance_prompt="a chest x-ray", tune_decoder=3))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("decoder") / "study")
    stage_data(study, DataConfig(patients=60, resolution=32))
    return study


FEW = TrainConfig(
    vae_steps=4,
    base_steps=2,
    base_batch_size=8,
    max_train_steps=2,
    train_batch_size=4,
    mixed_precision="no",
    heldout_images=4,
    preview_steps=None,
    device="cpu",
    tune_decoder=3,
    decoder_batch_size=4,
)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_both_classes_share_one_decoder(method, study, tmp_path, monkeypatch):
    name = dict(full="real100-rep0", lora="real050-rep0")[method]
    seen = []
    tune = tune_decoder
    monkeypatch.setattr(
        "cxr_synth.diffusion.generator.tune_decoder",
        lambda vae, images, *a: seen.append(len(images)) or tune(vae, images, *a),
    )
    cfg = dataclasses.replace(FEW, method=method, rank=2, lora_alpha=2)
    train_generator(study, name, cfg)
    rows = training_rows(study, 1.0 if method == "full" else 0.5, 0)
    assert seen == [len(rows)]  # once, on the generator's own films of both classes
    folder = study / "models" / name
    base = load_pipeline(folder / "base").vae
    vaes = [load_pipeline(model_of(study, name, c)[0]).vae for c in ("normal", "pneumonia")]
    first, second = (vae.state_dict() for vae in vaes)
    assert all(torch.equal(w, second[n]) for n, w in first.items())
    old = base.state_dict()
    changed = {n.split(".")[0] for n, w in first.items() if not torch.equal(w, old[n])}
    assert changed == {"decoder"}
    facts = read_json(folder / "normal/provenance.json")
    assert facts["decoder"]["steps"] == 3 and facts["decoder"]["images"] == len(rows)
    assert len(facts["decoder"]["grey_levels"]) == 2
    assert "decoder" in {line.split(",")[1] for line in (folder / "train.csv").read_text().split()}
    assert not (folder / DECODER_FILE).exists() and not list((folder / "checkpoints").glob("d*.pt"))
    if method == "full":
        plain = DiffusionPipeline.from_pretrained(folder / "normal", safety_checker=None)
        weight = plain.vae.decoder.conv_out.weight
        assert torch.equal(weight, first["decoder.conv_out.weight"])
        return
    card = (folder / "normal/README.md").read_text()
    assert DECODER_FILE in card and "pipe.vae.decoder.load_state_dict" in card
    copy = tmp_path / "models" / name
    shutil.copytree(folder, copy)
    (copy / "normal" / DECODER_FILE).unlink()
    with pytest.raises(CxrError, match="not the decoder that .* names"):
        load_pipeline(copy / "normal")
