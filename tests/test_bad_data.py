"Damaged, odd and hostile files in a folder: each is named and counted, and nothing is half-written."

import io, os, shutil
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from cxr_synth.base.files import CxrError
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.data.sources import folder_source, hub_source, open_source
from cxr_synth.data.survey import inspect_files
from cxr_synth.images.study_images import load_images, load_manifest
from cxr_synth.stages.data import stage_data
from cxr_synth.images.phantom import draw_phantom, write_phantoms


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", patients=40, size=64)


@pytest.fixture
def folder(drawn, tmp_path):
    return Path(shutil.copytree(drawn, tmp_path / "set"))


def picture(kind="L", size=(80, 64)):
    return Image.fromarray(draw_phantom(0, 0, 1, 80)).resize(size).convert(kind)


def saved(image, *args, **kw):
    "An image file as bytes."
    out = io.BytesIO()
    image.save(out, *args, **kw)
    return out.getvalue()


JPEG = saved(picture(), "JPEG")
BAD = dict(
    truncated=JPEG[: len(JPEG) // 2],
    mended=JPEG[: len(JPEG) * 3 // 4] + b"\xff\xd9",
    zero=b"",
    text=b"Dear colleague, please find attached",
    tiny=saved(picture(size=(1, 1)), "PNG"),
    animated=saved(
        picture(), "GIF", save_all=True, append_images=[picture(size=(80, 64)).rotate(9)]
    ),
)


@pytest.mark.parametrize("what", BAD)
def test_one_bad_image_stops(folder, tmp_path, what):
    (folder / "train/PNEUMONIA/person9_virus_9.jpeg").write_bytes(BAD[what])
    study = Study(tmp_path / "study")
    with pytest.raises(CxrError) as e:
        stage_data(study, DataConfig(source=str(folder), workers=2))
    text, n = str(e.value), len(folder_source(folder).rows)
    assert (
        f"1 of {n} images cannot be used; cannot read the image "
        "train/PNEUMONIA/person9_virus_9.jpeg: "
    ) in text and "--on-bad skip" in text
    assert len(text.splitlines()) <= 5 and not (study / "data").exists()


def test_skipping_is_recorded(folder, drawn, tmp_path):
    for k, what in enumerate(BAD):
        (folder / f"train/NORMAL/IM-900{k}-0001.JPEG").write_bytes(BAD[what])
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(source=str(folder), on_bad="skip", workers=2))
    assert len(load_manifest(study)) == len(folder_source(drawn).rows)
    report, page = read_json(study / "data/audit.json"), (study / "data/audit.html").read_text()
    assert any(f["level"] == "warning" and "6 " in f["found"] for f in report["findings"])
    for k in range(len(BAD)):
        assert f"IM-900{k}-0001.JPEG" in str(report) and f"IM-900{k}-0001.JPEG" in page
    stage_data(study, DataConfig(source=str(folder), on_bad="skip"))  # the same folder again: done


def test_a_bomb(folder):
    import zlib

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    side = 60_000  # 3.6 gigapixels in a few bytes
    (folder / "test/NORMAL/bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(CxrError, match="bomb.png"):
        inspect_files(folder_source(folder), 2)


def test_odd_but_good(folder, tmp_path):
    "16 bits, CMYK, palette and alpha come out like the plain grey image."
    plain = np.asarray(picture(), dtype=np.int16)
    deep = Image.fromarray(plain.astype(np.uint16) * 257)
    files = {
        "IM-9001-0001.png": saved(deep, "PNG"),
        "IM-9002-0001.jpg": saved(picture("CMYK"), "JPEG", quality=95),
        "IM-9003-0001.PNG": saved(picture("P"), "PNG"),
        "IM-9004-0001.tif": saved(picture(), "TIFF"),
        "IM-9005-0001.bmp": saved(picture("RGB"), "BMP"),
        "IM-9006-0001.png": saved(picture("LA"), "PNG"),
    }
    for name, raw in files.items():
        (folder / "train/NORMAL" / name).write_bytes(raw)
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(source=str(folder), workers=2))
    odd = load_images(study, [Path(n).stem for n in files]).astype(int)
    assert (abs(odd - odd[3]).mean((1, 2)) < 2).all()


def test_link_out_of_the_folder(folder, tmp_path):
    (tmp_path / "elsewhere.png").write_bytes(saved(picture(), "PNG"))
    (folder / "train/NORMAL/IM-9000-0001.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(CxrError, match="IM-9000-0001.png: it is a link to a place outside"):
        inspect_files(folder_source(folder), 2)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_no_permission(folder):
    path = folder / "train/NORMAL/IM-0001-0001.png"
    path.chmod(0)
    with pytest.raises(CxrError, match="IM-0001-0001.png"):
        inspect_files(folder_source(folder), 2)


def test_unreadable_medium(folder):
    "A read that fails for whatever reason of the system names the file."
    source = folder_source(folder)

    def read(path):
        raise PermissionError(13, "Permission denied", path)

    source.read = read
    with pytest.raises(CxrError, match="Permission denied"):
        inspect_files(source, 2)


def test_name_that_is_not_utf8(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "train/NORMAL" / name).write_bytes(saved(picture(), "PNG"))
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(CxrError, match=r"caf\\xe9.png: its name is not valid UTF-8"):
        inspect_files(folder_source(folder), 2)
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(source=str(folder), on_bad="skip", workers=2))
    assert r"caf\\xe9.png" in (study / "data/audit.json").read_text()


def test_one_name_in_two_classes(folder, tmp_path):
    for c in ("NORMAL", "PNEUMONIA"):
        (folder / "train" / c / "scan.png").write_bytes(
            saved(picture(size=(70, 60 + len(c))), "PNG")
        )
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(source=str(folder), workers=2))
    twins = load_manifest(study).query("path.str.endswith('/scan.png')")
    assert sorted(twins.image_id) == [
        "train__NORMAL__scan.png",
        "train__PNEUMONIA__scan.png",
    ] and set(twins.class_name) == {"normal", "pneumonia"}


def test_empty_class_folder(folder, tmp_path):
    (folder / "val/NORMAL").mkdir(parents=True)
    assert any("val/NORMAL" in n for n in folder_source(folder).notes)
    shutil.rmtree(folder / "train/NORMAL")
    (folder / "train/NORMAL").mkdir()
    with pytest.raises(CxrError, match="only pneumonia images for training"):
        folder_source(folder)


def test_table_of_patients_with_unknown_files(folder, tmp_path):
    (tmp_path / "who.csv").write_text("image,patient_id\nnobody.png,ann\n")
    study = Study(tmp_path / "study")
    with pytest.raises(
        CxrError, match="names 1 files that the source does not have, such as nobody.png"
    ):
        stage_data(study, DataConfig(source=str(folder), patient_rule=str(tmp_path / "who.csv")))
    assert not (study / "data").exists()


def test_hub_without_labels(tmp_path):
    from datasets import Dataset, Features, Image as Column

    (tmp_path / "hub/data").mkdir(parents=True)
    images = [dict(bytes=saved(picture(), "PNG"), path="a.png")]
    Dataset.from_dict(dict(image=images), features=Features(image=Column())).to_parquet(
        tmp_path / "hub/data/train-00000-of-00001.parquet"
    )
    with pytest.raises(CxrError, match=r"has 0 label columns \(columns: image\)"):
        hub_source(str(tmp_path / "hub"), cache_dir=tmp_path / "cache")


def test_network_lost_half_way(tmp_path, monkeypatch):
    "The commit was found, then the connection broke: a message, no traceback, nothing written."
    import datasets, huggingface_hub

    class Info:
        sha = "0" * 40

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: Info)

    def broken(*a, **k):
        raise ConnectionError("Connection reset by peer (train-00001-of-00004.parquet)")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    study = Study(tmp_path / "study")
    with pytest.raises(CxrError, match="Connection reset by peer") as e:
        open_source(study, DataConfig(source="hub"))
    assert "--data FOLDER" in str(e.value) and not study.root.exists()
