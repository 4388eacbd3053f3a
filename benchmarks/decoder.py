"""What a decoder tuned on a quarter of the training patients does for films of val patients.

The films themselves, their round trip through the autoencoder as it came, and through the tuned one:
L1, Fréchet distance to the training films beside its floor, and whether a head trained on real films
still sees their class. Nothing is drawn, so no U-Net is needed. Every part is kept in the study's folder;
the same command goes on.
"""

import argparse, json, time
from pathlib import Path
import numpy as np, torch
from diffusers import AutoencoderTiny
from cxr_synth.base.cache import cached, digest_array, weights_key
from cxr_synth.base.files import write_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import CLASSES, DataConfig, TrainConfig
from cxr_synth.diffusion.pipelines import round_trip
from cxr_synth.diffusion.tuned_decoder import tune_decoder
from cxr_synth.images.features import extract_features
from cxr_synth.images.study_images import load_images, split_rows, training_rows
from cxr_synth.quality.measure import Baseline, fit_head
from cxr_synth.stages.data import stage_data


def films(study, a):
    "The generator's training films, and one film of each of some val patients, with their rows."
    train = training_rows(study, 0.25, 0)
    val = split_rows(study, "val").drop_duplicates("patient_id")
    val = val.groupby("label").head(a.val)
    return [(rows, load_images(study, rows.image_id)) for rows in (train, val)]


def autoencoder(a):
    "As it came."
    return AutoencoderTiny.from_pretrained(a.vae).eval()


def tuned(study, train, a):
    "The autoencoder with its decoder tuned, and what the file says; seconds are those of this call."
    vae, start = autoencoder(a), time.perf_counter()
    cfg = TrainConfig(
        tune_decoder=a.steps,
        decoder_batch_size=a.batch,
        decoder_learning_rate=a.rate,
        checkpoint_steps=20,
        device="cpu",
    )
    file = study / f"decoder-{a.steps}x{a.batch}.safetensors"
    where = file, file.with_suffix(".pt"), cfg
    facts = tune_decoder(vae, train[:: a.every], *where, cache=study / "cache/latents")
    return vae.eval(), facts | dict(seconds=round(time.perf_counter() - start))


def sent_through(study, vae, images):
    "Round trips, kept."
    key = dict(vae=weights_key(vae), images=digest_array(images), torch=torch.__version__)
    return cached(study / "cache", "round-trip", key, lambda: round_trip(vae, images))


class Judge:
    "Judges images of the val films by what real training films are."

    def __init__(self, study, train, a):
        rows, images = train
        how = dict(size=a.size, cache=study / "cache", weights=a.weights)
        self.features = lambda images: extract_features(images, "mobilenet-v2", **how)
        x, y, who = self.features(images), rows.label.to_numpy(), rows.patient_id.to_numpy()
        self.head = fit_head(x, y)
        cut = [y == k for k in (0, 1)]
        self.baselines = [
            Baseline(x[mine], who[mine], x[~mine], extractor="mobilenet-v2") for mine in cut
        ]

    def __call__(self, films, images, labels):  # a row a class
        x, found = self.features(images), []
        for label, baseline in enumerate(self.baselines):
            mine = labels == label
            n = min(baseline.largest_n, int(mine.sum()))
            fd = baseline.measure(x[mine], n)["fd"]
            sees = (self.head(x[mine]) >= 0.5) == label
            l1 = np.abs(images[mine].astype(float) - films[mine]).mean()
            row = dict(cls=CLASSES[label], n=n, films=int(mine.sum()), l1=l1, fd=fd.value)
            found.append(row | dict(floor=fd.floor_high, agreement=float(sees.mean())))
        return found


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("source", help="folder of the films")
    p.add_argument("vae", help="folder of an AutoencoderTiny, such as TAESD")
    p.add_argument("--weights", help="file of MobileNetV2's weights")
    p.add_argument("--study", default="decoder-study", help="kept there, and continued")
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--every", type=int, default=1, help="train on every n-th of the films")
    p.add_argument("--rate", type=float, default=3e-4)
    p.add_argument("--val", type=int, default=200, help="val patients of a class, at most")
    p.add_argument("--size", type=int, default=224, help="side for MobileNetV2, px")
    a = p.parse_args()
    study = Study(Path(a.study))
    stage_data(study, DataConfig(source=a.source, resolution=128))
    train, (rows, val) = films(study, a)
    labels, judge = rows.label.to_numpy(), Judge(study, train, a)
    trips = dict(film=val, before=sent_through(study, autoencoder(a), val))
    vae, facts = tuned(study, train[1], a)
    trips["tuned"] = sent_through(study, vae, val)
    table = [dict(what=what) | row for what, x in trips.items() for row in judge(val, x, labels)]
    for row in table:
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else v for k, v in row.items()))
    print(json.dumps(facts))
    write_json(study / "decoder.json", dict(rows=table, decoder=facts))


if __name__ == "__main__":
    main()
