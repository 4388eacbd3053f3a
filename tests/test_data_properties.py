"Splits and fractions of random folders: nobody on two sides, nested, whatever the order of the files."

from itertools import combinations
import pandas as pd
from hypothesis import given, settings, strategies as st
from cxr_synth.data.splits import (
    add_groups,
    add_splits,
    draw_fractions,
    rounded_share,
    strata,
    training_patients,
)
from cxr_synth.data.survey import manifest_rows
from cxr_synth.images.study_images import FRACTIONS, REPLICATES, assert_disjoint

FOLDER = {"normal": "NORMAL", "bacteria": "PNEUMONIA", "virus": "PNEUMONIA"}
PATIENT = st.tuples(
    st.sampled_from(sorted(FOLDER)),
    st.sampled_from(["train", "train", "train", "val", "test"]),
    st.lists(st.sampled_from([None] * 12 + ["copy-a", "copy-b", "copy-c"]), min_size=1, max_size=4),
)  # one entry an image; copies share pixels


def files(patients):
    "What a scan of such a folder would find."
    rows = []
    for n, (kind, split, images) in enumerate(patients):
        for k, copy in enumerate(images):
            stem = f"IM-{n:04d}-{k:04d}" if kind == "normal" else f"person{n}_{kind}_{k}"
            rows.append(
                dict(
                    path=f"{split}/{FOLDER[kind]}/{stem}.jpeg",
                    class_name=FOLDER[kind].lower(),
                    official_split=split,
                    pixels_sha256=copy or f"{n}-{k}",
                )
            )
    return rows


def manifest(rows, seed):
    return add_splits(add_groups(manifest_rows(rows)), 0.15, seed)


folders = st.lists(PATIENT, min_size=4, max_size=60).map(files)
many = settings(max_examples=25, deadline=None)


@many
@given(folders, st.integers(0, 3))
def test_nobody_is_on_two_sides(rows, seed):
    t = manifest(rows, seed).assign(sha256=lambda t: t.pixels_sha256)
    part = {s: t[t.split == s] for s in ("train", "val", "internal", "test")}
    for a, b in combinations(part, 2):
        assert_disjoint(part[a], part[b])
    assert set(t.image_id[t.split == "test"]) == set(
        t.image_id[t.official_split == "test"]
    )  # the official test stays what it is
    left = t[t.split == ""]
    assert left.group.isin(
        t.group[t.official_split == "test"]
    ).all()  # left out only for the test's sake
    assert t[t.fold != ""].groupby("group").fold.nunique().le(1).all()


@many
@given(folders, st.integers(0, 3))
def test_shares(rows, seed):
    t = manifest(rows, seed)
    g = strata(t[t.split.isin(["train", "val", "internal"])]).merge(
        t.drop_duplicates("group")[["group", "split"]]
    )
    for _, of_class in g.groupby("label"):
        n, count = len(of_class), of_class.split.value_counts()
        assert count.get("val", 0) == rounded_share(n, 0.15)
        assert count.get("train", 0) == rounded_share(n - rounded_share(n, 0.15), 0.5)


@many
@given(folders, st.integers(0, 3))
def test_fractions_are_nested_and_inside_their_half(rows, seed):
    t = manifest(rows, seed)
    f = pd.DataFrame(
        draw_fractions(t, seed), columns=["image_id", "replicate", "min_fraction"]
    ).merge(t[["image_id", "group", "split", "label"]])
    assert len(f) == REPLICATES * t.split.isin(["train", "val", "internal"]).sum()
    least = f.min_fraction.astype(float)
    assert (least[f.split == "internal"] == 1).all()
    assert (
        f.groupby(["replicate", "group"]).min_fraction.nunique().le(1).all()
    )  # a patient comes in whole
    total = training_patients(t)
    label_of = (
        strata(t[t.split == "train"]).set_index("group").label
    )  # a group with both classes counts as pneumonia
    room = label_of.value_counts()
    for fraction in FRACTIONS:
        inside = f[(least <= fraction) & (f.split == "train")].drop_duplicates(
            ["replicate", "group"]
        )
        counts = (
            inside.assign(label=inside.group.map(label_of)).groupby(["replicate", "label"]).size()
        )
        for (_, label), n in counts.items():
            assert n == min(room[label], rounded_share(total[label], fraction))


@many
@given(folders, st.integers(0, 3), st.randoms())
def test_order_of_files_does_not_matter(rows, seed, random):
    once, shuffled = manifest(rows, seed), list(rows)
    random.shuffle(shuffled)
    again = manifest(shuffled, seed)
    assert once.equals(again) and draw_fractions(once, seed) == draw_fractions(again, seed)
