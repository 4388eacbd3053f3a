"""Drawings for the base model: adults, other machines and other findings than the study's children have.

Nothing of a study is in them: no pneumonia, none of the phantom's children, not its machine."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from cxr_synth.images.phantom import (
    bones,
    coordinates,
    ellipse,
    heart,
    lungs,
    phantom_rng,
    smooth_noise,
    soft_edge,
)

BODY = {  # wider than the children of `phantom.anatomy`; units as there
    "width": (0.62, 0.98),
    "height": (0.68, 1.00),
    "x": (-0.10, 0.10),
    "y": (-0.10, 0.10),
    "tilt": (-7, 7),
    "heart": (0.18, 0.40),
    "shift": (0.00, 0.18),
    "dome": (0.34, 0.74),
    "gap": (0.08, 0.17),
    "rib": (0.13, 0.24),
    "slope": (0.15, 0.80),
    "bone": (0.04, 0.14),
    "fat": (0.36, 0.64),
    "lung": (0.10, 0.30),
    "vessels": (0.02, 0.13),
}
FINDINGS = "none", "effusion", "nodules", "mass", "collapse", "pneumothorax", "enlarged heart"
AGES = {"an adult": (0.62, 0.98), "a teenager": (0.58, 0.84), "an old person": (0.66, 0.98)}
SHOWS = {
    "none": (
        "clear lungs, no finding",
        "healthy normal lungs",
        "clear lung fields",
        "a normal chest",
    ),
    "effusion": ("a pleural effusion, opacity at the base", "fluid at the base of the {side} lung"),
    "nodules": ("lung nodules", "small round nodules, several round opacities"),
    "mass": ("a mass in the {side} lung", "a large round opacity in the {side} lung"),
    "collapse": ("collapse of the {side} upper lobe", "a dense opacity in the {side} upper zone"),
    "pneumothorax": ("a pneumothorax, no lung marks on the {side}", "air around the {side} lung"),
    "enlarged heart": ("an enlarged heart", "a wide heart shadow, clear lung fields"),
}


class Drawing(NamedTuple):
    "One film and what is said of it."

    film: np.ndarray  # uint8 (size, size)
    caption: str


def _lens(x, y, cx, cy, rx, ry, edge):
    "A round shadow with a soft rim, 0 to 1."
    return soft_edge(ellipse(x, y, cx, cy, rx, ry), edge)


def _effusion(x, y, a, side, rng):
    "Fluid: dense below a level that climbs at the outer wall."
    level = rng.uniform(0.0, 0.5) - 0.5 * np.clip(side * x - 0.3, 0, None)
    return soft_edge(y - level, rng.uniform(0.02, 0.06)) * (side * x > 0) * rng.uniform(0.7, 1.0)


def _nodules(x, y, a, side, rng):
    "Two to seven small round shadows on both sides."
    shadow = 0
    for _ in range(rng.integers(2, 8)):
        cx, cy, r = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.4), rng.uniform(0.05, 0.11)
        shadow = np.maximum(shadow, _lens(x, y, cx, cy, r, r, 0.3))
    return shadow * rng.uniform(0.5, 0.9)


def _mass(x, y, a, side, rng):
    "One large shadow with a plain rim."
    cx, cy, r = side * rng.uniform(0.25, 0.55), rng.uniform(-0.5, 0.3), rng.uniform(0.14, 0.28)
    rim = 0.15 * smooth_noise(rng, 7, len(x))
    return soft_edge(ellipse(x, y, cx, cy, r, r * rng.uniform(0.8, 1.2)) + rim, 0.12) * rng.uniform(
        0.6, 1
    )


def _collapse(x, y, a, side, rng):
    "A wedge without air at the top of one lung."
    border = rng.uniform(-0.45, -0.15) + rng.uniform(-0.5, 0.5) * (side * x - 0.3)
    return soft_edge(border - y, 0.04) * (side * x > 0) * rng.uniform(0.6, 1.0)


def _no_shadow(x, y, a, side, rng):
    "Nothing is added."
    return np.zeros_like(x)


_SHADOWS = dict(effusion=_effusion, nodules=_nodules, mass=_mass, collapse=_collapse)


def _body(finding: str, age: str, rng) -> dict:
    "The proportions of one person."
    a = {name: rng.uniform(*bounds) for name, bounds in (BODY | dict(width=AGES[age])).items()}
    if finding == "enlarged heart":
        a["heart"] = rng.uniform(0.42, 0.56)
    return a


def _shoulders(x, y, rng):
    "Collar bones, and arms at the upper corners."
    rise = rng.uniform(-0.15, 0.15)
    line = y + rng.uniform(0.62, 0.85) + rise * np.abs(x)
    wide = (np.abs(x) > 0.12) & (np.abs(x) < 0.8)
    collar = np.exp(-((line / rng.uniform(0.03, 0.05)) ** 2)) * wide
    raised = 0.4 * np.clip(-y - 0.3, 0, None) * rng.integers(2)
    arms = soft_edge(np.abs(x) - rng.uniform(0.8, 1.1) + raised, 0.05)
    return rng.uniform(0.03, 0.12) * collar + rng.uniform(0, 0.25) * arms


def _neck(x, y, rng):
    "Air beside the neck: what is left of the body, 0 to 1."
    slope, start = rng.uniform(0.5, 1.2), rng.uniform(-0.85, -0.6)
    wide = rng.uniform(0.22, 0.32) + np.clip(y - start, 0, None) / slope * 3
    return np.maximum(soft_edge(wide - np.abs(x), 0.04), soft_edge(y - start - 0.2, 0.05))


def _vessels(x, y, a, rng):
    "Vessels that fan out from the roots of the lungs."
    roots = np.exp(-(((np.abs(x) - 0.2) / 0.25) ** 2) - (y / 0.4) ** 2)
    large, small = smooth_noise(rng, 11, len(x)), smooth_noise(rng, 19, len(x))
    return a["vessels"] * (1.4 * np.abs(large) * roots + 0.5 * np.abs(small))


def _objects(film, rng):
    "A letter, a lead or a tube, on one film in three."
    size = len(film)
    what = rng.integers(9)
    if what == 0:
        h, w = rng.integers(size // 20 + 1, size // 9, 2)
        i, j = (
            rng.integers(0, size // 8),
            rng.choice([rng.integers(1, size // 8), size - size // 8 - w]),
        )
        film[i : i + h, j : j + w] += rng.uniform(0.2, 0.5)
    elif what in (1, 2):
        t = np.linspace(0, 1, 4 * size)
        bend = rng.uniform(-0.2, 0.2, 3)
        col = (rng.uniform(0.2, 0.8) + bend[0] * t + bend[1] * np.sin(3 * t + bend[2] * 10)) * size
        row = np.clip((rng.uniform(0, 0.3) + t * rng.uniform(0.3, 0.7)) * size, 0, size - 1).astype(
            int
        )
        film[row, np.clip(col, 0, size - 1).astype(int)] += rng.uniform(0.05, 0.25)
    return film


def _machine(film, rng):
    "Scatter, blur, grain, exposure, shutters: of many machines."
    size = len(film)
    if rng.random() < 0.4:
        share = rng.uniform(0.1, 0.45)
        film = (1 - share) * film + share * ndimage.gaussian_filter(
            film, rng.uniform(0.08, 0.2) * size
        )
    film = ndimage.gaussian_filter(film, size * rng.uniform(0.001, 0.010))
    film = film + rng.normal(size=film.shape) * np.exp(rng.uniform(np.log(0.0015), np.log(0.025)))
    film = (film - film.mean()) / film.std()
    film = np.sign(film) * np.abs(film) ** rng.uniform(0.85, 1.15)
    film = rng.uniform(90, 150) + rng.uniform(38, 66) * film
    if rng.random() < 0.2:
        top, bottom, left, right = rng.integers(0, size // 10 + 1, 4)
        film[:top], film[size - bottom :], film[:, :left], film[:, size - right :] = 0, 0, 0, 0
    return np.clip(film, 0, 255).astype(np.uint8)


def draw(number: int, size: int = 64, seed: int = 0) -> Drawing:
    "Film and caption `number`; they depend on the arguments alone."
    rng = phantom_rng("base drawings", seed, number)
    finding = FINDINGS[rng.choice(len(FINDINGS), p=[0.4, *[0.1] * 6])]
    age, side = list(AGES)[rng.integers(len(AGES))], rng.choice([-1, 1])
    a = _body(finding, age, rng)
    x, y = coordinates(size, a, rng.uniform(-3, 3), zoom=rng.uniform(0.85, 1.3))
    bend = rng.uniform(-0.12, 0.12)
    x = x + bend * y * np.abs(y)
    middle, fields = heart(x, y, a), lungs(x, y, a)
    clear = fields * (1 - middle) * (1 - 0.9 * soft_edge(0.12 - np.abs(x), 0.03))
    shadow = _SHADOWS.get(finding, _no_shadow)(x, y, a, side, rng)
    vessels = _vessels(x, y, a, rng)
    air = np.zeros_like(x)
    if finding == "pneumothorax":
        air = soft_edge(side * x - rng.uniform(0.35, 0.6) + 0.3 * y, 0.02) * fields
        vessels = vessels * (1 - air)
    body = soft_edge(ellipse(x, y, 0, 0.35, rng.uniform(1.1, 1.4) * a["width"], 1.45, 3), 0.06)
    tissue = a["fat"] + rng.uniform(0.02, 0.07) * smooth_noise(rng, 4, size)
    if rng.random() < 0.5:
        body = body * _neck(x, y, rng)
    belly = rng.uniform(0, 0.3) * soft_edge(y - a["dome"] - 0.3 * x**2, 0.05)
    dense = rng.uniform(0.06, 0.16) * middle + belly
    solid = body * (tissue + dense + bones(x, y, a) + _shoulders(x, y, rng))
    depth = a["fat"] - a["lung"] - vessels + 0.05 * air
    film = solid - clear * depth * (1 - shadow)
    words = SHOWS[finding][rng.integers(len(SHOWS[finding]))]
    words = words.format(side="left" if side > 0 else "right")
    verb = ["of", "showing"][rng.integers(2)]
    caption = f"a chest xray {verb} {words}"
    if rng.random() < 0.5:
        caption += f", {age}"
    return Drawing(_machine(_objects(film, rng), rng), caption)
