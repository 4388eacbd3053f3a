"""The pixels of the data stage: every step on the 224 px set; then full-size originals to PNGs, the
loop of the guide's section 6 against `prepare_file`, median ratio of rounds taken in turn.
"""

import argparse, os, shutil, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

os.environ["CXR_QUIET"] = "1"
import numpy as np
from PIL import Image
from cxr_synth.images.images import (
    decode_upright,
    decoder_reduction,
    inspect_file,
    map_threads,
    open_image,
    pixel_cache,
    prepare_file,
    prepare_image,
    resize_to_square,
)
from cxr_synth.images.phantom import draw_phantom

DATA = Path(os.environ.get("CXR_DATA") or Path(__file__).parents[2] / "shared" / "data")


def stand_ins(folder, n=16):
    "Large phantoms with film noise, as JPEGs in the sizes and qualities of the originals."
    for k in range(n):
        x = draw_phantom(k, 0, k % 2, size=1600)[: 1100 + 30 * (k % 8), : 1200 + 25 * k]
        x = np.clip(x + np.random.default_rng(k).normal(0, 1.5, x.shape), 0, 255).astype(np.uint8)
        Image.fromarray(x).save(folder / f"{k:02d}.jpeg", quality=75 if k % 2 else 95)
    return sorted(folder.glob("*.jpeg"))


class Fresh:
    "Items as the `datasets` library gives them, opened anew each time."

    def __init__(self, files):
        self.files = files

    def __iter__(self):
        return (dict(image=Image.open(f), label=k % 2) for k, f in enumerate(self.files))


def guide(dataset, output_dir, target_size=512):
    "The loop of the guide, line by line, without its progress bar."
    from torchvision import transforms

    os.makedirs(f"{output_dir}/normal", exist_ok=True)
    os.makedirs(f"{output_dir}/pneumonia", exist_ok=True)
    transform = transforms.Compose([transforms.Resize((target_size, target_size))])
    for idx, sample in enumerate(dataset):
        img, label = sample["image"], sample["label"]
        if img.mode != "RGB":
            img = img.convert("RGB")
        img = transform(img)
        img.save(f"{output_dir}/{'normal' if label == 0 else 'pneumonia'}/{idx:05d}.png")


def ours(out, fit, job):
    k, file = job
    prepare_file(file.read_bytes(), file.name, f"{out}/{fit}/{k:05d}.png", 512, fit)


def differences(fit, file):
    "Mean absolute difference in grey levels from full decoding, convert('L') and Lanczos."
    image = open_image(file.read_bytes())
    size, shrink = image.size, decoder_reduction(image, 512, fit)
    plain = prepare_image(Image.open(file).convert("L"), 512, fit)
    fast = resize_to_square(decode_upright(image, shrink), 512, fit, size, shrink)
    return np.abs(np.asarray(plain, float) - np.asarray(fast, float)).mean()


def seconds(f):
    "Wall-clock and processor time; the second tells what a busy machine hides."
    start, busy = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - start, time.process_time() - busy


def originals(files, rounds, workers, out):
    "The comparison on full-size files."
    jobs, times = list(enumerate(files)), {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(
            pool.map(partial(ours, out, "pad"), jobs)
        )  # untimed: starts the processes, fills the disk cache
        ways = {
            "guide": lambda: guide(Fresh(files), f"{out}/guide"),
            **{
                f"ours, {fit}, {workers} threads": partial(
                    map_threads, partial(ours, out, fit), jobs, workers, ""
                )
                for fit in ("squash", "pad", "crop")
            },
            f"ours, squash, {workers} processes": lambda: list(
                pool.map(partial(ours, out, "squash"), jobs, chunksize=4)
            ),
            "ours, squash, 1 thread": lambda: map_threads(
                partial(ours, out, "squash"), jobs, 1, ""
            ),
        }
        for _ in range(rounds):
            for name, way in ways.items():
                times.setdefault(name, []).append(seconds(way))
    for name, pairs in times.items():
        wall, busy = zip(*pairs)
        ratio = median(g / o for (g, _), o in zip(times["guide"], wall))
        print(
            f"{name:28} {len(files) / median(wall):6.0f} images/s   ratio {ratio:5.2f}"
            + (
                ""
                if "processes" in name
                else f"   processor {1e3 * median(busy) / len(files):5.1f} ms an image"
            )
        )
    for fit in ("squash", "pad", "crop"):
        d = map_threads(partial(differences, fit), files, workers, "")
        print(
            f"difference from the plain path, {fit:6}: mean {np.mean(d):.2f}, largest of an image "
            f"{max(d):.2f} grey levels"
        )


def small_set(files, workers, out):
    "All that the data stage does with the pixels of the set, step by step."
    ids = [f.stem for f in files]
    steps = {
        "look": lambda: map_threads(
            lambda f: inspect_file(f.read_bytes(), f.name), files, workers, ""
        ),
        "prepare_file 224 px": lambda: map_threads(
            lambda f: prepare_file(f.read_bytes(), f.name, out / "224" / f"{f.stem}.png", 224),
            files,
            workers,
            "",
        ),
    }
    for size in (64, 224):
        steps[f"pixel cache {size} px"] = lambda size=size: pixel_cache(
            out / "cache", ids, [out / "224" / f"{i}.png" for i in ids], size, workers=workers
        ).close()
    steps["both caches again"] = lambda: [steps[f"pixel cache {size} px"]() for size in (64, 224)]
    total = sum(
        print(f"{name:28} {(t := seconds(step))[0]:6.1f} s   processor {t[1]:5.1f} s") or t[0]
        for name, step in steps.items()
    )
    if sys.platform != "win32":
        import resource
    memory = (
        ""
        if sys.platform == "win32"
        else f"   most memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )
    print(f"{'together':28} {total:6.1f} s{memory}")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--rounds", type=int, default=5, help="times that each way is measured, in turn"
)
parser.add_argument("--workers", type=int, default=2, help="threads, or processes")
parser.add_argument("--files", type=int, default=0, help="only so many files of each set; 0 is all")

if __name__ == "__main__":
    args, out = parser.parse_args(), Path(tempfile.mkdtemp())
    small = sorted((DATA / "kermany-224").rglob("*.jpeg"))[: args.files or None]
    print(
        f"{len(small)} files of kermany-224, {args.workers} threads"
        if small
        else "no kermany-224 (set CXR_DATA): this part is left out"
    )
    if small:
        small_set(small, args.workers, out)  # first, before torch takes memory
    files = sorted((DATA / "kermany-originals").rglob("*.jpeg"))[: args.files or None]
    print(
        f"\n{len(files)} originals of the real set"
        if files
        else "\nno kermany-originals (set CXR_DATA): drawn phantoms with noise as stand-ins, so other "
        "numbers than on the real files"
    )
    originals(files or stand_ins(out), args.rounds, args.workers, out)
    shutil.rmtree(out)
