"""How often the gate marks films of real children, and images of generators that have learned nothing.

python benchmarks/chest_gate.py FOLDER [--draws 20]     FOLDER: such as kermany-224

Training and held-out films are drawn anew each time; patients are told apart by the first part of a name.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr_synth.images.chest_gate import learn_chest

SIZES = ((18, 60), (180, 60), (180, 500), (1500, 500))  # training films, held-out films


def read_films(folder, side=64):
    "One film of each patient (N, side, side) uint8."
    first = {}
    for path in sorted(Path(folder).rglob("*.jpeg")):
        first.setdefault("_".join(path.stem.split("_")[:2]) or path.stem, path)
    images = [Image.open(p).convert("L").resize((side, side)) for p in first.values()]
    return np.stack([np.asarray(image) for image in images])


def with_greys(x, like):
    "Images with the mean and the spread of films."
    about = dict(axis=(1, 2), keepdims=True)
    x = (x - x.mean(**about)) / x.std(**about)
    return (x * like.std(**about) + like.mean(**about)).clip(0, 255).astype(np.uint8)


def marked_shares(films, sizes, rng):
    "Shares marked of new films, fog, noise, negatives and films upside down."
    drawn = films[rng.permutation(len(films))]
    train, held, new = np.split(drawn, np.cumsum(sizes))
    new = new[:400]
    noise = rng.normal(size=new.shape)
    fog = np.stack([gaussian_filter(x, 8) for x in noise])
    gate = learn_chest(train, held)
    sets = new, with_greys(fog, new), with_greys(noise, new), 255 - new, new[:, ::-1]
    return [float(gate.marks(images).mean()) for images in sets]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    films, rng = read_films(args.folder), np.random.default_rng(0)
    print(f"{len(films)} films, one of each patient; marked, % (mean over {args.draws} draws)")
    print("train, held  real films (most)  fog  noise  negative  upside down")
    for sizes in SIZES:
        found = 100 * np.array([marked_shares(films, sizes, rng) for _ in range(args.draws)])
        real, *others = found.mean(0)
        rest = "  ".join(f"{x:.1f}" for x in others)
        print(f"{sizes[0]}, {sizes[1]}  {real:.2f} ({found[:, 0].max():.1f})  {rest}", flush=True)


if __name__ == "__main__":
    main()
