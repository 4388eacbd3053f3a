"""Pixels are what a viewer shows, from any file and through every door; what can't be is refused by name.

The truth is an independent one: the array that the file was made from, a window written out here,
`ImageOps.exif_transpose`.
"""

import io, os, socket, sys
from unittest.mock import patch

import numpy as np, pydicom, pytest
from PIL import Image, ImageOps
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from cxr_synth.base.files import CxrError
from cxr_synth.guide import ChestXrayDataset
from cxr_synth.images.folders import (
    image_files,
    list_folder,
    read_folder,
    read_image,
    read_image_folder,
    unused_files,
)
from cxr_synth.images.images import decode_image, inspect_file, prepare_file, prepare_image
from cxr_synth.images.phantom import draw_phantom

FILM = Image.fromarray(draw_phantom(3, 0, 1, size=96)).crop((0, 12, 96, 84))
X8 = np.asarray(FILM)
X12 = 1000 + X8.astype(np.uint16) * 4  # a chest in 12 bits, 1000 to 2020


def stored(fmt, image=FILM, **kw):
    f = io.BytesIO()
    image.save(f, fmt, **kw)
    return f.getvalue()


def dicom(x, bits=16, kind="MONOCHROME2", syntax=ExplicitVRLittleEndian, **tags):
    "The bytes of a DICOM file that holds the array."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = "1.2.3.4"
    if kind == "PALETTE COLOR":
        ds.set_pixel_data(x, "MONOCHROME2", bits, generate_instance_uid=False)
        ds.PhotometricInterpretation = kind
    else:
        ds.set_pixel_data(x, kind, bits, generate_instance_uid=False)
    for name, value in tags.items():
        setattr(ds, name, value)
    if syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds["PixelData"].value = x.astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"
    f = io.BytesIO()
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    pydicom.dcmwrite(f, ds, enforce_file_format=True) if little else pydicom.dcmwrite(
        f, ds, little_endian=False, implicit_vr=implicit
    )
    return f.getvalue()


def bare(x, syntax, **kw):
    "The same without the 128 bytes, the mark and the header that names the encoding."
    raw = dicom(x, **kw)
    ds = pydicom.dcmread(io.BytesIO(raw))
    del ds.file_meta
    f = io.BytesIO()
    pydicom.dcmwrite(f, ds, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    return f.getvalue()


def table(values, bits, first=0):
    "A lookup table as DICOM stores it."
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [len(values), first, bits]
    lut.LUTData = [int(v) for v in values]
    lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
    return pydicom.Sequence([lut])


def held(x):
    "Lowest value black, highest white."
    x = np.asarray(x, float)
    return (x - x.min()) / (x.max() - x.min()) * 255


def linear(x, center, width):
    "The window of DICOM's standard (C.11.2.1.2.1)."
    return np.clip(((x - (center - 0.5)) / (width - 1) + 0.5) * 255, 0, 255)


def palette(values):
    "The tags of a palette of grey."
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        raw = np.asarray(values, "<u2").tobytes()
        tags[f"{colour}PaletteColorLookupTableData"] = raw
    return tags


PADDED = X12.copy()
PADDED[:8] = 63000
INSIDE = held(np.where(np.arange(len(X12))[:, None] < 8, X12.min(), X12))
SIGNED = X12.astype(np.int16) - 3000
SHOWN = {  # name: (file, what a viewer shows; None: not known in the padding)
    "16 stored, 12 used": (dicom(X12), held(X12)),
    "16 stored, 10 used": (dicom(X8.astype(np.uint16) * 4), held(X8)),
    "16 stored, all used": (dicom(X8.astype(np.uint16) * 257), held(X8)),
    "12 stored": (dicom(X12, 12), held(X12)),
    "rescaled, no window": (dicom(X12, RescaleSlope=1, RescaleIntercept=-1024), held(X12)),
    "negative slope": (dicom(X12, RescaleSlope=-2, RescaleIntercept=9000), 255 - held(X12)),
    "half a rescaling": (dicom(X12, RescaleSlope=3), held(X12)),
    "half a window": (dicom(X12, WindowCenter=1500), held(X12)),
    "signed": (dicom(SIGNED), held(X12)),
    "negative film": (dicom(X12, kind="MONOCHROME1"), 255 - held(X12)),
    "8 bits": (dicom(X8, 8), X8),
    "8 bits, negative film": (dicom(X8, 8, "MONOCHROME1"), 255 - X8.astype(int)),
    "window": (dicom(X12, WindowCenter=1600, WindowWidth=700), linear(X12, 1600, 700)),
    "window after rescaling": (
        dicom(X12, RescaleSlope=2, RescaleIntercept=-500, WindowCenter=2500, WindowWidth=1200),
        linear(X12 * 2.0 - 500, 2500, 1200),
    ),
    "two windows": (
        dicom(X12, WindowCenter=[1600, 40], WindowWidth=[700, 80]),
        linear(X12, 1600, 700),
    ),
    "sigmoid": (
        dicom(X12, WindowCenter=1600, WindowWidth=700, VOILUTFunction="SIGMOID"),
        255 / (1 + np.exp(-4 * (X12 - 1600.0) / 700)),
    ),
    "exact": (
        dicom(X12, WindowCenter=1600, WindowWidth=700, VOILUTFunction="LINEAR_EXACT"),
        np.clip(((X12 - 1600.0) / 700 + 0.5) * 255, 0, 255),
    ),
    "table": (dicom(X12, 12, VOILUTSequence=table(np.arange(4096) * 16, 16)), X12 / 16),
    "table of 12 bits that says 16": (
        dicom(X12, 12, VOILUTSequence=table(np.arange(4096), 16)),
        X12 / 16,
    ),
    "modality table": (
        dicom(X12, 12, ModalityLUTSequence=table(np.arange(4096)[::-1] * 4, 16)),
        255 - held(X12),
    ),
    "palette": (dicom(X8, 8, "PALETTE COLOR", **palette(np.arange(256)[::-1] * 256)), 255.0 - X8),
    "colour": (dicom(np.stack([X8] * 3, -1), 8, "RGB"), X8),
    "run lengths": (dicom(X12, syntax=RLELossless), held(X12)),
    "implicit": (dicom(X12, syntax=ImplicitVRLittleEndian), held(X12)),
    "big end first": (dicom(X12, syntax=ExplicitVRBigEndian), held(X12)),
    "no preamble": (bare(X12, ExplicitVRLittleEndian), held(X12)),
    "no preamble, implicit": (bare(X12, ImplicitVRLittleEndian), held(X12)),
}


@pytest.mark.parametrize("name", ["film.dcm", "film.DICOM", "film", "1.2.840.113619.2", "a.png"])
@pytest.mark.parametrize("kind", SHOWN)
def test_dicom_is_what_a_viewer_shows(kind, name):
    raw, truth = SHOWN[kind]
    assert np.abs(np.asarray(decode_image(raw, name), float) - truth).max() <= 1.01


def test_padding_does_not_count():
    raw = dicom(PADDED, PixelPaddingValue=63000)
    assert np.abs(np.asarray(decode_image(raw, "a.dcm"), float) - INSIDE)[8:].max() <= 1
    raw = dicom(PADDED, PixelPaddingValue=60000, PixelPaddingRangeLimit=65535)
    assert np.abs(np.asarray(decode_image(raw, "a.dcm"), float) - INSIDE)[8:].max() <= 1


def floats(x):
    ds = pydicom.dcmread(io.BytesIO(dicom(x)))
    ds.FloatPixelData = x.astype("<f4").tobytes()
    del ds.PixelData
    f = io.BytesIO()
    ds.save_as(f)
    return f.getvalue()


REFUSED = {
    "frames": (dicom(np.stack([X12] * 3), NumberOfFrames=3), "3 frames"),
    "float": (floats(X12), "floating-point"),
    "one value": (dicom(X12 * 0 + 7), "all its pixels are 7"),
    "more than its bits": (dicom(X12 * 8, 16, BitsStored=12), "more than the 12 bits"),
    "window without width": (dicom(X12, WindowCenter=1, WindowWidth=0), "cannot read the image"),
    "colour of 16 bits": (dicom(np.stack([X12] * 3, -1), 16, "RGB"), "its colours have 16 bits"),
    "unknown kind": (dicom(X8, 8, PhotometricInterpretation="CMYK"), "photometric interpretation"),
    "cut": (dicom(X12)[:6000], "cannot read the image"),
    "deep png, 12 used": (
        stored("PNG", Image.fromarray(X8.astype(np.uint16) * 16)),
        "12 of its 16",
    ),
    "signed tiff": (stored("TIFF", tiffinfo={339: (2,)}), "signed numbers of 8 bits"),
    "float tiff": (stored("TIFF", Image.fromarray(X8 / 255.0)), "floating-point"),
    "animated png": (stored("PNG", save_all=True, append_images=[FILM.rotate(9)]), "2 frames"),
    "animated webp": (stored("WEBP", save_all=True, append_images=[FILM.rotate(9)]), "2 frames"),
    "pages": (stored("TIFF", save_all=True, append_images=[FILM]), "2 frames"),
    "two pictures of a phone": (stored("MPO", save_all=True, append_images=[FILM]), "2 frames"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    raw, why = REFUSED[kind]
    for read in (decode_image, inspect_file):
        with pytest.raises(CxrError, match="cannot read the image set/x.7: ") as e:
            read(raw, "set/x.7")
        assert why in str(e.value) and len(str(e.value).splitlines()) <= 5


def test_without_pydicom(tmp_path):
    (tmp_path / "film").write_bytes(SHOWN["no preamble"][0])
    with patch.dict(sys.modules, {"pydicom": None}), pytest.raises(CxrError) as e:
        read_image(tmp_path / "film")
    assert "film: it is a DICOM file, which needs pydicom" in str(e.value)
    assert 'pip install "cxr_synth[dicom]"' in str(e.value)


def png48(x):
    "A PNG of three channels with 16 bits, which Pillow cannot write."
    import struct, zlib

    rows = b"".join(b"\0" + np.stack([row] * 3, -1).astype(">u2").tobytes() for row in x)
    head = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
    return out


def test_colours_of_16_bits():
    assert (np.asarray(decode_image(png48(X8.astype(np.uint16) * 257), "a.png")) == X8).all()
    with pytest.raises(CxrError, match="lower bits of its 16"):
        decode_image(png48(X8.astype(np.uint16) * 8), "a.png")


def clear(mode):
    "The film with its upper rows transparent and white beneath."
    x = np.array(FILM.convert("RGBA"))
    x[:20] = 255, 255, 255, 0
    image = Image.fromarray(x)
    if mode == "P":
        flat = Image.fromarray(np.where(np.arange(72)[:, None] < 20, 255, np.minimum(X8, 254)))
        return flat.convert("L").convert("P"), dict(transparency=255)
    return image.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("how", ["grey", "colour"])
def test_transparent_is_black(mode, how, tmp_path):
    image, more = clear(mode)
    image.save(tmp_path / "a.png", **more)
    x = np.asarray(read_image(tmp_path / "a.png", "L" if how == "grey" else "RGB"))
    assert not x[:20].any() and x[20:].max() > 150


# --- turned only by a tag


TURNED = {
    (suffix, k): kw
    for k in range(1, 9)
    for suffix, kw in {
        ".jpg": dict(quality=95),
        ".png": {},
        ".tif": {},
        ".webp": dict(lossless=True),
    }.items()
}


@pytest.mark.parametrize(("suffix", "k"), TURNED)
def test_exif_turns_apply_at_every_door(suffix, k, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = k
    path = tmp_path / f"film{suffix}"
    FILM.save(path, exif=exif, **TURNED[suffix, k])
    truth = np.asarray(
        ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))).convert("L"), float
    )
    doors = dict(
        study=decode_image(path.read_bytes(), path.name),
        image=read_image(path),
        colour=read_image(path, "RGB").convert("L"),
        folder=read_folder(tmp_path)[0],
        guide=ChestXrayDataset({"normal": tmp_path})[0][0].convert("L"),
    )
    for door, x in doors.items():
        assert np.abs(np.asarray(x, float) - truth).max() <= 1, door
    square = np.asarray(prepare_image(Image.fromarray(truth.astype(np.uint8)), 48), float)
    prepare_file(path.read_bytes(), path.name, tmp_path / ".out.png", 48)
    for x in (read_image_folder(tmp_path, 48)[1][0], Image.open(tmp_path / ".out.png")):
        assert np.abs(np.asarray(x, float) - square).mean() < 1.5


# --- files that lost a part, with an end put on


BIG = Image.fromarray(draw_phantom(5, 0, 1, size=512))
JPEGS = {
    "plain": dict(quality=75),
    "fine": dict(quality=98, subsampling=0),
    "tables of its own": dict(optimize=True),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_blocks=16),
    "colour": dict(quality=80),
}


def jpeg(kind):
    return stored("JPEG", BIG.convert("RGB") if kind == "colour" else BIG, **JPEGS[kind])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("end", [b"", b"\xff\xd9", b"\xff\xd9 appended text"])
def test_a_jpeg_with_a_cut_body(kind, share, end):
    raw = jpeg(kind)
    start = raw.rfind(b"\xff\xda") + 14
    cut = raw[: start + int((len(raw) - 2 - start) * share)].rstrip(b"\xff")
    with pytest.raises(CxrError, match="cut off|truncated|broken"):
        decode_image(cut + end, "a.jpeg")


@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_passes(kind):
    for end in (b"", b"\0\0", b" appended text"):
        assert decode_image(jpeg(kind) + end, "a.jpeg").size == BIG.size


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_the_rest_is_zeros(fmt, share):
    raw = stored(fmt, BIG)
    n = int(len(raw) * share)
    for tail in (bytes(len(raw) - n), b"", raw[-12:]):
        with pytest.raises(CxrError, match="cannot read the image a.png"):
            decode_image(raw[:n] + tail, "a.png")


# --- what lies in folders


CLUTTER = ["._film.png", ".DS_Store", ".hidden.png", "Thumbs.db", "THUMBS.DB", "desktop.ini"]
CLUTTER_FOLDERS = ["__MACOSX", ".ipynb_checkpoints", ".git", "scan.png", "Scan.JPEG", "old.dcm"]


@pytest.fixture
def folder(tmp_path):
    "Two films among all that computers leave behind."
    films = tmp_path / "films"
    for name in ["", *CLUTTER_FOLDERS]:
        (films / name).mkdir(parents=True)
        FILM.save(films / name / "a.png")
        FILM.save(films / name / "._a.png")
    FILM.save(films / "b.PNG")
    for name in CLUTTER:
        (films / name).write_bytes(b"\0\0")
    return films


def test_clutter_is_left_out(folder):
    names = ["a.png", "b.PNG"]
    assert [p.name for p in image_files(folder)] == names
    assert [p.name for p in list_folder(folder, below=True).images] == names
    assert read_folder(folder).shape == (2, 72, 96)
    assert unused_files(folder) == 3  # the folders with a picture's name
    assert len(ChestXrayDataset({"normal": folder})) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes among files")
@pytest.mark.parametrize("what", ["pipe", "socket", "device"])
def test_no_regular_file_is_read(folder, what, monkeypatch):
    path = folder / "c.png"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(folder)  # a socket's path may have about 100 characters
        socket.socket(socket.AF_UNIX).bind("c.png")
    assert [p.name for p in image_files(folder)] == ["a.png", "b.PNG"]
    assert path in list_folder(folder).odd
    with pytest.raises(CxrError, match="c.png: it is no regular file"):
        read_image(path)


@pytest.mark.parametrize("link", ["nowhere.png", "c.png"])
def test_a_link_to_nowhere_is_named(folder, link):
    (folder / "c.png").symlink_to(link)
    with pytest.raises(CxrError, match="cannot read the image .*c.png"):
        read_folder(folder)


def test_what_an_empty_folder_holds_is_said(tmp_path):
    for name in ("a.gif", "b.gif", "notes.txt", "LICENSE", ".DS_Store"):
        (tmp_path / name).write_text("x")
    with pytest.raises(CxrError, match="holds no images") as e:
        image_files(tmp_path)
    assert "2 .gif, 1 .txt, 1 without a suffix" in str(e.value)
