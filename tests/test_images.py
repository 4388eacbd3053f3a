"""The image path and the pixel cache where a notebook can't show them.

Several processes, killed ones, damage at random, the real originals.
"""

import ast, io, os, struct, subprocess, sys, time, zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch
import numpy as np, pydicom, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from cxr_synth.base.files import CxrError
from cxr_synth.images import images
from cxr_synth.images.images import (
    decode_image,
    decode_upright,
    decoder_reduction,
    inspect_file,
    open_image,
    pixel_cache,
    prepare_file,
    prepare_image,
    resize_to_square,
)
from cxr_synth.images.phantom import draw_phantom, write_phantoms

REAL = (
    Path(os.environ.get("CXR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    / "kermany-originals"
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return sorted(
        write_phantoms(tmp_path_factory.mktemp("drawn") / "phantoms", patients=60, size=96).rglob(
            "*.png"
        )
    )


def names(paths):
    return [p.stem for p in paths]


def left(folder):
    return sorted(p.suffix for p in folder.iterdir())


# --- the cache and other processes

BUILD = """
import sys, time
from pathlib import Path
from cxr_synth.images import images
paths, slow = sorted(Path(sys.argv[2]).rglob("*.png")), float(sys.argv[3])
real = images.decode_image
images.decode_image = lambda *a: time.sleep(slow) or real(*a)
print(images.pixel_cache(sys.argv[1], [p.stem for p in paths], paths, 48, workers=1)[paths[5].stem].sum())
"""


def build(folder, drawn, slow=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), str(drawn[0].parents[2]), str(slow)],
        stdout=subprocess.PIPE,
        text=True,
    )


def started(p, folder):
    "Wait until the process has written some pixels."
    while p.poll() is None and not any(t.stat().st_size > 5000 for t in folder.glob(".*~")):
        time.sleep(0.005)
    assert p.poll() is None, "it should still be at work"


def test_two_processes_build_at_once(tmp_path, drawn):
    both = [build(tmp_path, drawn, 0.01) for _ in range(2)]
    for p in both:
        started(p, tmp_path)
    said = [p.communicate()[0] for p in both]
    cache = pixel_cache(tmp_path, names(drawn), drawn, 48)
    assert [p.returncode for p in both] == [0, 0] and said[0] == said[
        1
    ] == f"{cache[drawn[5].stem].sum()}\n"
    assert left(tmp_path) == [".json", ".npy"]
    for p in drawn:
        assert (cache[p.stem] == np.asarray(prepare_image(Image.open(p), 48))).all()


def test_killed_builder_leaves_no_half_cache(tmp_path, drawn):
    p = build(tmp_path, drawn, 0.01)
    started(p, tmp_path)
    p.kill()
    p.wait()
    assert [p.name[-1] for p in tmp_path.iterdir()] == ["~"]
    os.utime(next(tmp_path.iterdir()), (time.time() - 7200,) * 2)  # two hours later
    cache = pixel_cache(tmp_path, names(drawn), drawn, 48)
    assert left(tmp_path) == [".json", ".npy"] and cache.pixels.shape == (len(drawn), 48, 48)


def test_killed_reader_does_no_harm(tmp_path, drawn):
    cache = pixel_cache(tmp_path, names(drawn), drawn, 48)
    before = cache[names(drawn)]
    code = (
        "import sys, time, numpy as np; x = np.load(sys.argv[1], mmap_mode='r'); "
        "print(x[3].sum(), flush=True); time.sleep(60)"
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code, str(cache.path)], stdout=subprocess.PIPE, text=True
    )
    assert int(p.stdout.readline()) == before[3].sum()
    p.kill()
    p.wait()
    assert (pixel_cache(tmp_path, names(drawn), drawn, 48)[names(drawn)] == before).all()


def test_two_threads_build_at_once(tmp_path, drawn):
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: pixel_cache(tmp_path, names(drawn), drawn, 48), range(3)))
    assert all((c[names(drawn)] == caches[0][names(drawn)]).all() for c in caches) and left(
        tmp_path
    ) == [".json", ".npy"]


def ask(cache, name):
    return cache[name]


def test_cache_goes_to_a_spawned_process(tmp_path, drawn):
    cache = pixel_cache(tmp_path, names(drawn), drawn, 48)
    assert cache.pixels.shape[0] == len(drawn)  # open here, and not sent along
    with get_context("spawn").Pool(1) as pool:
        assert (pool.apply(ask, (cache, drawn[7].stem)) == cache[drawn[7].stem]).all()


def test_faster_process_on_windows(tmp_path, drawn):
    "There a file that someone has mapped can't be replaced."
    replace = os.replace

    def refuse(a, b):
        if Path(b).suffix != ".npy":
            return replace(a, b)
        Path(b).write_bytes(Path(a).read_bytes())  # the other process's file, with the same content
        raise PermissionError(13, "Access is denied", str(b))

    with patch("os.replace", refuse):
        cache = pixel_cache(tmp_path, names(drawn), drawn, 48)
    assert (
        cache[names(drawn)]
        == pixel_cache(tmp_path / "other", names(drawn), drawn, 48)[names(drawn)]
    ).all()

    def never(a, b):
        raise PermissionError(13, "Access is denied", str(b))

    with patch("os.replace", never), pytest.raises(PermissionError):
        pixel_cache(tmp_path / "third", names(drawn), drawn, 48)


def test_changed_file(tmp_path):
    "Same size, written again at once, before the clock ticks; a reader of the old cache goes on."
    paths = [tmp_path / f"{k}.bmp" for k in range(4)]
    for k, p in enumerate(paths):
        Image.fromarray(draw_phantom(k, 0, 0)).save(p)
    ids = names(paths)
    old = pixel_cache(tmp_path / "cache", ids, paths, 32)
    for again in range(5):
        s = paths[0].stat()
        Image.fromarray(draw_phantom(9 + again, 0, 0)).save(paths[0])
        os.utime(
            paths[0], ns=(s.st_atime_ns, s.st_mtime_ns)
        )  # the worst case: same size, same time
        new = pixel_cache(tmp_path / "cache", ids, paths, 32)
        assert (new["0"] == np.asarray(prepare_image(Image.open(paths[0]), 32))).all() and (
            new[ids[1:]] == old[ids[1:]]
        ).all()
    assert (old["0"] == np.asarray(prepare_image(Image.fromarray(draw_phantom(0, 0, 0)), 32))).all()


def test_file_that_changes_while_it_is_read(tmp_path, drawn):
    path = tmp_path / "a.png"
    path.write_bytes(drawn[0].read_bytes())

    def fingerprint(p, old):
        return [1, 1, "0" * 64]

    with (
        patch("cxr_synth.images.images.file_fingerprint", fingerprint),
        pytest.raises(CxrError, match="a.png changed while it was being read"),
    ):
        pixel_cache(tmp_path / "cache", ["a"], [path], 32)
    assert left(tmp_path / "cache") == []


def test_full_disk(tmp_path, drawn):
    class Full(io.FileIO):
        def write(self, b):
            raise OSError(28, "No space left on device")

    with (
        patch("cxr_synth.images.images.open", lambda p, mode: Full(p, "w"), create=True),
        pytest.raises(OSError, match="No space left"),
    ):
        pixel_cache(tmp_path, names(drawn), drawn, 48)
    assert left(tmp_path) == []


def test_unreadable_file(tmp_path, drawn):
    path = tmp_path / "secret.png"
    path.write_bytes(drawn[0].read_bytes())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user (root?) may read every file")
    with pytest.raises(CxrError, match="cannot read the image .*secret.png: .*Permission denied"):
        pixel_cache(tmp_path / "cache", ["a"], [path], 32)


# --- files that are no X-ray


def film():
    return Image.fromarray(draw_phantom(3, 0, 1, size=96)).crop((0, 12, 96, 84))


def stored(fmt, image=None, **kw):
    f = io.BytesIO()
    (image or film()).save(f, fmt, **kw)
    return f.getvalue()


def bomb(width, height):
    "A PNG of 60 bytes that claims to be huge."

    def part(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", b"") + part(b"IEND", b"")


def dicom(x, **tags):
    "The bytes of a DICOM file that holds the array, with some tags changed."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = "1.2.3.4"
    ds.set_pixel_data(x, "MONOCHROME2", 8, generate_instance_uid=False)
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    f = io.BytesIO()
    ds.save_as(f, enforce_file_format=True)
    return f.getvalue()


X8 = np.asarray(film())
REFUSED = {
    "bomb.png": (bomb(50_000, 40_000), "decompression bomb"),
    "large.png": (bomb(9000, 9000), "the most is 64 million"),
    "dot.png": (stored("PNG", film().resize((1, 1))), "it is 1 x 1 px"),
    "moving.png": (stored("PNG", save_all=True, append_images=[film().rotate(9)]), "2 frames"),
    "float.tif": (stored("TIFF", Image.fromarray(X8 / 255.0)), "floating-point"),
    "truncated.dcm": (dicom(X8)[:2000], "truncated.dcm"),
    "frames.dcm": (dicom(np.stack([X8] * 3), NumberOfFrames=3), "3 frames"),
    "hsv.dcm": (dicom(X8, PhotometricInterpretation="HSV"), "photometric interpretation"),
    "report.dcm": (dicom(X8, PixelData=None), "without an image"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_no_xray(name, tmp_path):
    "Each reader refuses it, names the file and says why; nothing is written."
    raw, why = REFUSED[name]
    for read in (
        lambda: decode_image(raw, name),
        lambda: inspect_file(raw, name),
        lambda: prepare_file(raw, name, tmp_path / "out.png", 64),
    ):
        with pytest.raises(CxrError, match=f"cannot read the image {name}: ") as e:
            read()
        assert why in str(e.value)
    assert left(tmp_path) == []


def test_unknown_fit_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(CxrError, match="unknown fit 'stretch'"):
        prepare_file(b"", "a.png", tmp_path / "out.png", 64, "stretch")


def test_one_list_of_suffixes():
    "No other module has a list of image suffixes of its own."
    package = Path(images.__file__).parents[1]
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                texts = {n.value for n in node.elts if isinstance(n, ast.Constant)}
                if len(texts & set(images.IMAGE_SUFFIXES)) > 1:
                    found.append(f"{path.relative_to(package).as_posix()}:{node.lineno}")
    assert [f.split(":")[0] for f in found] == ["images/images.py"], found


# --- damage at random


FILES = {
    "a.jpeg": stored("JPEG"),
    "progressive.jpg": stored("JPEG", progressive=True),
    "a.png": stored("PNG"),
    "a.tif": stored("TIFF", compression="tiff_lzw"),
    "a.bmp": stored("BMP"),
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4),
    st.floats(0, 1),
)
def test_damage_is_a_sentence_or_a_picture(name, patches, end):
    "Bytes overwritten and the end cut off: a grey picture, or a CxrError that names the file; nothing else."
    raw = bytearray(FILES[name])
    for at, new in patches:
        k = int(at * (len(raw) - len(new)))
        raw[k : k + len(new)] = new
    raw = bytes(raw[: int(len(raw) * (end if end < 0.8 else 1))])
    try:
        image = decode_image(raw, name)
    except CxrError as e:
        assert (
            str(e).startswith(f"cannot read the image {name}: ") and len(str(e).splitlines()) <= 5
        )
    else:
        assert image.mode == "L" and len(image.tobytes()) == image.width * image.height


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(40, 400),
    st.integers(40, 400),
    st.integers(32, 128),
    st.sampled_from(["squash", "pad", "crop"]),
    st.integers(0, 3),
)
def test_any_size_fits(width, height, resolution, fit, seed):
    "Fast path or plain, whatever the size: a square of the right size, and the same to about a grey level."
    x = np.asarray(
        Image.fromarray(draw_phantom(seed, 0, 1, size=64)).resize((12, 12)).resize((width, height))
    )  # no detail finer than 8 px in the square
    f = io.BytesIO()
    Image.fromarray(x).save(f, "JPEG", quality=95)
    image = open_image(f.getvalue())
    size, shrink = image.size, decoder_reduction(image, resolution, fit)
    fast = resize_to_square(decode_upright(image, shrink), resolution, fit, size, shrink)
    plain = prepare_image(decode_image(f.getvalue(), ""), resolution, fit)
    assert fast.size == plain.size == (resolution, resolution) and fast.mode == plain.mode == "L"
    assert np.abs(np.asarray(fast, float) - np.asarray(plain, float)).mean() < 1.5
    assert (np.asarray(prepare_image(plain, resolution, fit)) == np.asarray(plain)).all()


def prepare_all(paths, folder, workers):
    "The files of a set, prepared in threads."

    def one(path):
        return prepare_file(path.read_bytes(), path.name, folder / path.name, 64)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, paths))
    return [(folder / p.name).read_bytes() for p in paths]


def test_same_bytes_whatever_the_number_of_threads(tmp_path, drawn):
    assert prepare_all(drawn, tmp_path / "1", 1) == prepare_all(drawn, tmp_path / "4", 4)


# --- the real originals


@pytest.mark.skipif(
    not REAL.is_dir(),
    reason=f"no kermany-originals in {REAL.parent} (set CXR_DATA); phantoms cover the code",
)
@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_fast_path_on_the_originals(fit):
    "Within one grey level of full decoding, convert('L') and Lanczos: every single image."
    files, off = sorted(REAL.rglob("*.jpeg")), []
    for f in files:
        image = open_image(f.read_bytes())
        size, shrink = image.size, decoder_reduction(image, 512, fit)
        fast = resize_to_square(decode_upright(image, shrink), 512, fit, size, shrink)
        plain = prepare_image(Image.open(f).convert("L"), 512, fit)
        off.append(np.abs(np.asarray(fast, float) - np.asarray(plain, float)).mean())
    assert len(files) == 87 and max(off) < 1 and np.mean(off) > 0.1  # and it is another path


@pytest.mark.skipif(
    not REAL.is_dir(),
    reason=f"no kermany-originals in {REAL.parent} (set CXR_DATA); phantoms cover the code",
)
def test_two_encoders_in_the_originals():
    facts = [
        inspect_file(f.read_bytes(), f.name) | dict(label=f.parent.name)
        for f in sorted((REAL / "train").rglob("*.jpeg"))
    ]
    quality = {
        c: np.median([f["quality"] for f in facts if f["label"] == c])
        for c in ("NORMAL", "PNEUMONIA")
    }
    assert quality["PNEUMONIA"] == 75 and quality["NORMAL"] > 90
    assert {f["mode"] for f in facts} == {"L", "RGB"} and len(
        {f["pixels_sha256"] for f in facts}
    ) == len(facts)
