"""Draws a product photo: a silhouette of a kind, filled with a colour and a pattern, on a grey background."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
"""Photo width and height, pixels."""

Colour = tuple[int, int, int]
Place = Callable[[list[tuple[float, float]]], list[tuple[float, float]]]

COLOURS: dict[str, Colour] = {
    "red": (208, 32, 44),
    "blue": (38, 84, 208),
    "green": (42, 150, 62),
    "yellow": (242, 212, 46),
    "orange": (242, 136, 30),
    "purple": (124, 48, 164),
    "pink": (246, 152, 188),
    "brown": (118, 74, 38),
    "black": (26, 26, 28),
    "white": (246, 246, 244),
}
KINDS = ("shirt", "shoe", "bag", "lamp", "mug", "hat")
PATTERNS = ("plain", "striped", "dotted", "checked")
_PALE = {"white", "yellow", "pink"}


def draw(kind: str, colour: str, pattern: str, seed: int) -> Image.Image:
    """The photo of one item, `SIDE` x `SIDE` RGB; everything but the three words comes from `seed`."""
    rng = random.Random(seed)
    shade = rng.randint(130, 225)
    photo = Image.new("RGB", (SIDE, SIDE), _vary((shade, shade, shade), 14, rng))
    photo.paste(_texture(colour, pattern, rng), (0, 0), _silhouette(kind, rng))
    noise = np.random.default_rng(rng.randrange(2**31)).normal(0, 4, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(photo, np.float32) + noise).clip(0, 255).astype(np.uint8))


def _vary(colour: Colour, amount: float, rng: random.Random) -> Colour:
    red, green, blue = (max(0, min(255, round(v + rng.uniform(-amount, amount)))) for v in colour)
    return red, green, blue


def _texture(colour: str, pattern: str, rng: random.Random) -> Image.Image:
    """A square of the colour with the pattern in a contrasting colour."""
    base = _vary(COLOURS[colour], 14, rng)
    if colour in _PALE:
        ink = _vary((60, 60, 65), 18, rng)
    elif colour == "black" or rng.random() < 0.6:
        ink = _vary((238, 238, 238), 12, rng)
    else:
        ink = _vary((40, 40, 45), 12, rng)
    image = Image.new("RGB", (SIDE, SIDE), base)
    pen = ImageDraw.Draw(image)
    pitch = rng.randint(9, 14)
    width, start = max(2, pitch // 4), rng.randrange(pitch) - pitch
    upright = rng.random() < 0.5
    if pattern in ("striped", "checked"):
        for position in range(start, SIDE, pitch):
            if pattern == "checked" or upright:
                pen.rectangle((position, 0, position + width, SIDE), fill=ink)
            if pattern == "checked" or not upright:
                pen.rectangle((0, position, SIDE, position + width), fill=ink)
    elif pattern == "dotted":
        for row, y in enumerate(range(start, SIDE + pitch, pitch)):
            for x in range(start + (pitch // 2 if row % 2 else 0), SIDE + pitch, pitch):
                pen.ellipse((x - width, y - width, x + width, y + width), fill=ink)
    return image


def _silhouette(kind: str, rng: random.Random) -> Image.Image:
    """The kind's shape, white on black, at a random size and place. Shapes live in [-1, 1] x [-1, 1]."""
    half = SIDE * rng.uniform(0.32, 0.46)
    centre_x, centre_y = (SIDE / 2 + SIDE * rng.uniform(-0.07, 0.07) for _ in range(2))
    mask = Image.new("L", (SIDE, SIDE), 0)

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(centre_x + x * half, centre_y + y * half) for x, y in points]

    _SHAPES[kind](ImageDraw.Draw(mask), place)
    return mask


def _shirt(pen: ImageDraw.ImageDraw, place: Place) -> None:
    right = [(0.0, -0.62), (0.16, -0.68), (0.42, -0.8), (1.0, -0.34), (0.76, 0.02), (0.5, -0.2), (0.5, 0.9)]
    pen.polygon(place(right + [(-x, y) for x, y in reversed(right)]), fill=255)


def _shoe(pen: ImageDraw.ImageDraw, place: Place) -> None:
    outline = [(-0.95, -0.55), (-0.35, -0.5), (-0.1, -0.1), (0.6, 0.08), (0.95, 0.3), (0.95, 0.62), (-0.95, 0.62)]
    pen.polygon(place(outline), fill=255)


def _bag(pen: ImageDraw.ImageDraw, place: Place) -> None:
    pen.rectangle(place([(-0.8, -0.2), (0.8, 0.88)]), fill=255)
    pen.arc(place([(-0.46, -0.92), (0.46, 0.45)]), 180, 360, fill=255, width=5)


def _lamp(pen: ImageDraw.ImageDraw, place: Place) -> None:
    pen.polygon(place([(-0.42, -0.9), (0.42, -0.9), (0.84, 0.18), (-0.84, 0.18)]), fill=255)
    pen.rectangle(place([(-0.08, 0.1), (0.08, 0.8)]), fill=255)
    pen.rectangle(place([(-0.42, 0.74), (0.42, 0.92)]), fill=255)


def _mug(pen: ImageDraw.ImageDraw, place: Place) -> None:
    pen.rectangle(place([(-0.72, -0.7), (0.44, 0.76)]), fill=255)
    pen.arc(place([(0.14, -0.4), (0.96, 0.46)]), 270, 90, fill=255, width=6)


def _hat(pen: ImageDraw.ImageDraw, place: Place) -> None:
    pen.pieslice(place([(-0.62, -0.78), (0.62, 1.1)]), 180, 360, fill=255)
    pen.ellipse(place([(-1.0, 0.08), (1.0, 0.5)]), fill=255)


_SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Place], None]] = {
    "shirt": _shirt,
    "shoe": _shoe,
    "bag": _bag,
    "lamp": _lamp,
    "mug": _mug,
    "hat": _hat,
}
