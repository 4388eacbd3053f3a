"Splits and fractions of random folders: nobody on two sides, nested, whatever the order of the files."

from itertools import combinations
import pandas as pd
from hypothesis import given, settings, strategies as st
from cxr_synth.data.splits import (
    add_groups,
    add_splits,
    draw_fractions,
    replicate_overlap,
    rounded_share,
    slot_edge,
    smallest_fraction,
    strata,
    stratified_order,
    too_small,
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
    label_of = strata(t[t.split == "train"]).set_index("group").label  # both classes: pneumonia
    half = label_of.value_counts()
    for fraction in FRACTIONS:  # slots of a tenth of the half; a fraction of an odd half is rounded
        inside = f[(least <= fraction) & (f.split == "train")]
        inside = inside.drop_duplicates(["replicate", "group"])
        counts = inside.groupby(["replicate", inside.group.map(label_of)]).size()
        for (_, label), n in counts.items():
            assert abs(n - half[label] * 2 * fraction) < 1


@many
@given(folders, st.integers(0, 3), st.randoms())
def test_order_of_files_does_not_matter(rows, seed, random):
    once, shuffled = manifest(rows, seed), list(rows)
    random.shuffle(shuffled)
    again = manifest(shuffled, seed)
    assert once.equals(again) and draw_fractions(once, seed) == draw_fractions(again, seed)


GROUPS = st.lists(  # (class, kind) of each group of patients; any number of each
    st.sampled_from([(0, "normal"), (1, "bacteria"), (1, "bacteria"), (1, "virus")]),
    min_size=1,
    max_size=90,
)


def half_of(kinds):
    "One row per group, as `strata` gives it."
    rows = [dict(group=f"g{n}", label=a, kind=b) for n, (a, b) in enumerate(kinds)]
    return pd.DataFrame(rows)


def holders(order, slots, fraction, least=0):
    "Of each replicate the groups that a fraction holds."
    found = [smallest_fraction(order, k, slots, least) for k in range(REPLICATES)]
    return [{g for g, f in smallest.items() if f <= fraction} for smallest in found]


@many
@given(GROUPS, st.integers(0, 3))
def test_blocks_are_disjoint_and_together_all_patients(kinds, seed):
    "Ten blocks at 5 %, the first five and the last five at 10 %: each patient is in one, once."
    order = stratified_order(half_of(kinds), seed, "fraction")
    everybody = sorted(order.group)
    assert sorted(g for held in holders(order, 10, 0.05) for g in held) == everybody
    at_10 = holders(order, 10, 0.1)
    for blocks in (at_10[:5], at_10[5:]):
        assert sorted(g for held in blocks for g in held) == everybody
    assert all(held == set(everybody) for held in holders(order, 10, 0.5))
    for a, b in combinations(holders(order, 20, 0.1), 2):  # of val: all ten
        assert not a & b


@many
@given(GROUPS, st.integers(0, 3))
def test_each_replicate_is_nested_with_kinds_in_proportion(kinds, seed):
    order = stratified_order(half_of(kinds), seed, "fraction")
    total = order.groupby(["label", "kind"]).size()
    smaller = [set()] * REPLICATES
    for fraction in FRACTIONS:
        held = holders(order, 10, fraction)
        for inner, outer in zip(smaller, held):
            assert inner <= outer
            found = order[order.group.isin(outer)].groupby(["label", "kind"]).size()
            off = found.reindex(total.index, fill_value=0) - total * 2 * fraction
            assert off.abs().max() <= 2  # of a class and kind, by rounding
        smaller = held


@many
@given(st.integers(1, 500), st.integers(0, 9))
def test_slots_are_as_even_as_whole_patients_allow(n, slot):
    assert slot_edge(n, 0) == 0 and slot_edge(n, 10) == n
    assert abs(slot_edge(n, slot + 1) - slot_edge(n, slot) - n / 10) < 1
    assert slot_edge(n, slot + 10) == n + slot_edge(n, slot)  # the second round


@many
@given(st.integers(1, 9), st.integers(0, 3))
def test_a_small_val_has_two_patients_of_a_class(n, seed):
    order = stratified_order(half_of([(0, "normal")] * n + [(1, "virus")] * 9), seed, "fraction")
    for fraction in (0.05, 0.25):
        for held in holders(order, 20, fraction, least=2):
            assert (order[order.group.isin(held)].label == 0).sum() >= min(2, n)


def made_up(normal, ill):
    "A manifest of so many training and internal patients."
    kinds = [(0, "normal")] * normal + [(1, "bacteria"), (1, "virus")] * (ill // 2)
    t = half_of(kinds).assign(image_id=lambda t: t.group, patient_id=lambda t: t.group)
    return t.assign(split=["train", "internal"] * (len(t) // 2))


def test_replicates_share_no_patient_where_a_word_is_given():
    "Independent draws from the half share 10 % of their patients at 5 % and 20 % at 10 %."
    t = made_up(200, 400)
    drawn = pd.DataFrame(draw_fractions(t, 0)).astype(dict(min_fraction=float))
    assert replicate_overlap(t, drawn, 0.05, 10) == 0
    assert replicate_overlap(t, drawn, 0.1, 5) == 0
    assert 0.35 < replicate_overlap(t, drawn, 0.25, 5) < 0.45
    assert replicate_overlap(t, drawn, 0.5, 5) == 1


def test_what_is_too_small_is_what_no_replicate_may_lack():
    "A fraction is named unless every replicate has two patients of each class."
    for normal in (2, 8, 10, 18, 20, 22, 36, 40, 50):
        t = made_up(normal, 100)
        drawn = pd.DataFrame(draw_fractions(t, 0)).merge(t[["image_id", "label", "split"]])
        drawn = drawn[(drawn.split == "train") & (drawn.label == 0)]
        named = "".join(too_small(t))
        for fraction in FRACTIONS:
            inside = drawn[drawn.min_fraction.astype(float) <= fraction]
            least = (
                inside.groupby("replicate").size().reindex(range(REPLICATES), fill_value=0).min()
            )
            assert (f"{fraction:.0%}" in named.split(":")[0]) == (least < 2), (normal, fraction)
