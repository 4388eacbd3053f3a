"""Whose images these are, and which base was tuned: one owner of each fact, and no claim about data
that nobody knows.
"""

import os, re
from dataclasses import replace
from pathlib import Path

import pytest, torch
from cxr_synth.diffusion import families, hub, preflight
from cxr_synth.base.files import CxrError, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import BASES, BaseModel, DataConfig, TrainConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.protocol.dataset import CARDS, dataset_card, find_card, lineage
from cxr_synth.diffusion.generator import train_generator
from cxr_synth.images.phantom import write_phantoms

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("CXR_DATA", ROOT.parent / "shared/data")) / "kermany-224"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data set is not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Drawings under names of the Kermany set's pattern."
    root = tmp_path_factory.mktemp("films") / "films"
    write_phantoms(root, patients=120)
    return root


def test_a_folder_is_not_assumed_to_be_the_default_data_set(folder, tmp_path):
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(source=str(folder), resolution=32))
    assert (
        dataset_card(study)
        == CARDS["unknown"]
        == find_card("folder", stems=[p.stem for p in folder.rglob("*.*")])
    )
    (study / "data/dataset.json").unlink()  # as an older version left it
    assert dataset_card(study) == CARDS["unknown"]


def test_a_large_phantom_set_is_not_taken_for_the_kermany_set():
    stems = [
        f"person{p}_{kind}_{k}"
        for p in range(1, 2000)
        for kind in ("bacteria", "virus")
        for k in (1, 2, 3)
    ]
    assert find_card("folder", stems=stems) == CARDS["unknown"]


@needs_data
def test_the_real_folder_is_recognised_by_its_names(tmp_path):
    stems = [p.stem for p in REAL.rglob("*.jpeg")]
    assert find_card("folder", stems=stems) == CARDS["kermany"]
    assert find_card("folder", stems=stems[::2]) == CARDS["kermany"]
    assert find_card("folder", stems=stems[:50]) == CARDS["unknown"]


def test_facts_are_stated_and_corrected_without_repeating_anything(folder, tmp_path):
    study, cfg = Study(tmp_path / "study"), DataConfig(source=str(folder), resolution=32)
    with pytest.raises(CxrError, match="neither a known data set nor a file"):
        stage_data(study, replace(cfg, card="nobody"))
    assert not (study / "data").exists()
    write_json(tmp_path / "a.json", dict(licence="CC BY-SA 4.0", population="adults"))
    stage_data(study, replace(cfg, card=str(tmp_path / "a.json")))
    made = (study / "data/manifest.csv").stat().st_mtime_ns
    (tmp_path / "a.json").unlink()
    stage_data(
        study, replace(cfg, card=str(tmp_path / "a.json"))
    )  # as recorded: the study has the facts
    assert dataset_card(study).licence == "CC BY-SA 4.0"
    stage_data(study, replace(cfg, card="kermany"))
    assert (
        dataset_card(study) == CARDS["kermany"]
        and read_json(study / "data/stage.json")["runtime"]["card"] == "kermany"
    )
    assert (study / "data/manifest.csv").stat().st_mtime_ns == made


def test_other_images_bring_other_facts(folder, tmp_path):
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(patients=120, resolution=32))
    assert dataset_card(study).drawn
    stage_data(study, DataConfig(source=str(folder), resolution=32), redo=True)
    assert dataset_card(study) == CARDS["unknown"]


# -- bases


@pytest.mark.parametrize("name", [n for n, b in BASES.items() if b.scratch])
def test_a_base_from_nothing_passes_the_preflight_and_is_trained(name, tmp_path):
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(patients=120, resolution=32))
    cfg = TrainConfig(
        base=name,
        vae_steps=1,
        base_steps=1,
        max_train_steps=1,
        lr_warmup_steps=0,
        heldout_images=None,
        preview_steps=None,
        joint=True,
    )
    assert preflight.preflight(cfg, 32)["disk"]["download"] == 0
    train_generator(study, "real050-rep0", cfg)
    card = (study / "models/real050-rep0/joint/README.md").read_text(encoding="utf-8")
    assert "trained from nothing" in card and "drawn phantoms" in card and "Kermany" not in card
    assert hub.check_source(study / "models/real050-rep0/joint")


def test_a_base_to_download_passes_the_preflight():
    for name in [n for n, b in BASES.items() if b.repo]:
        with torch.device("meta"):
            found = {
                k: round(families.millions(m.parameters()), 2)
                for k, m in families.known_parts(name).items()
            }
        assert found == BASES[name].millions


def test_a_third_base_is_not_taken_for_another(monkeypatch):
    unet = dict(attention_head_dim=8, cross_attention_dim=512)
    monkeypatch.setitem(
        BASES,
        "third",
        BaseModel("somebody/third", licence="MIT", unet=unet, text=(512, 4, 8, "gelu")),
    )
    with torch.device("meta"):
        parts = families.known_parts("third")
    assert (
        parts["unet"].config.cross_attention_dim == 512
        and parts["text_encoder"].config.num_hidden_layers == 4
    )
    assert "third" in families.allowed_sources() and "(MIT)" in lineage(
        CARDS["kermany"], "somebody/third"
    )
    with pytest.raises(CxrError, match="unknown base 'fourth'"):
        families.known_parts("fourth")


def test_no_module_but_the_tables_names_a_base_or_a_licence():
    for path in sorted((ROOT / "cxr_synth").rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        if path.name not in ("settings.py", "_modidx.py"):
            assert not re.search(
                r'in \("tiny", "laptop"\)|== "(tiny|laptop|sd15|sd21-base)"', code
            ), path
        if path.name not in ("settings.py", "dataset.py", "_modidx.py"):
            for fact in (
                "CC BY",
                "cc-by",
                "Kermany",
                "Open RAIL",
                "one hospital",
                "children only",
                "of children",
            ):
                assert fact not in code, (path, fact)
