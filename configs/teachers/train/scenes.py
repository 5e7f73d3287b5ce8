"""Captioned scenes, drawn by program.

A scene is one to three bright objects on a dark background. The caption states
what must be seen (how many, which colour, which shape, which background); all
else is left open on purpose: place, size and rotation of every object, direction
and phase of a pattern, the place of every spot. A model that predicts the mean
over what is open draws a blur, so few-step sampling has something to learn.

This module knows nothing of models and nothing of how a picture is judged.
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np

SIZE = 32

COLOURS = {
    "red": (232, 48, 48),
    "green": (64, 212, 72),
    "yellow": (246, 216, 56),
    "cyan": (56, 200, 240),
    "pink": (244, 96, 208),
    "white": (246, 246, 246),
}
SHAPES = {"disc": "discs", "ring": "rings", "bar": "bars", "cross": "crosses", "triangle": "triangles"}
COUNTS = {1: "a", 2: "two", 3: "three"}
# Two tones of each family: plain is the dark tone alone.
BACKGROUNDS = {
    "navy": ((12, 18, 72), (44, 60, 136)),
    "maroon": ((64, 10, 26), (128, 36, 56)),
    "forest": ((8, 50, 28), (32, 108, 60)),
    "grey": ((34, 34, 38), (94, 94, 100)),
}
PATTERNS = ("plain", "striped", "checkered", "spotted")
RELATIONS = ("left", "above")

# Base radius by the number of objects, in pixels.
RADII = {1: (5.0, 7.5), 2: (4.2, 5.6), 3: (3.7, 4.6)}
GAP = 2.5
TRIES = 8
CELL = 4
# Share of scenes with one group of objects; the others have two single objects.
SINGLE_GROUP = 0.65


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and one shape."""

    count: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What is to be seen; a caption may state less."""

    groups: tuple[Group, ...]
    relation: str | None
    background: str
    pattern: str


def is_held_out(scene):
    """Whether a combination of colour, shape and background is kept from training (one in eight)."""
    return any(
        zlib.crc32(f"{g.colour} {g.shape} {scene.background}".encode()) % 8 == 0 for g in scene.groups
    )


def random_scene(rng):
    """A scene drawn without regard to the hold-out."""
    shapes, colours = list(SHAPES), list(COLOURS)
    background = str(rng.choice(list(BACKGROUNDS)))
    pattern = str(rng.choice(PATTERNS))
    if rng.random() < SINGLE_GROUP:
        group = Group(int(rng.integers(1, 4)), str(rng.choice(colours)), str(rng.choice(shapes)))
        return Scene((group,), None, background, pattern)
    first, second = rng.choice(colours, 2, replace=False)
    groups = (
        Group(1, str(first), str(rng.choice(shapes))),
        Group(1, str(second), str(rng.choice(shapes))),
    )
    relation = str(rng.choice(RELATIONS)) if rng.random() < 0.5 else None
    return Scene(groups, relation, background, pattern)


def scene_of_split(rng, held_out):
    """A scene of the training split, or of the held-out split."""
    while True:
        scene = random_scene(rng)
        if is_held_out(scene) == held_out:
            return scene


def caption_of(scene, rng):
    """A caption of `scene`; one in five leaves out the pattern, one in ten the whole background."""
    words = []
    for index, group in enumerate(scene.groups):
        if index > 0:
            words += {"left": ["left", "of"], "above": ["above"], None: ["and"]}[scene.relation]
        noun = group.shape if group.count == 1 else SHAPES[group.shape]
        words += [COUNTS[group.count], group.colour, noun]
    draw = rng.random()
    if draw < 0.7:
        words += ["on", "a", scene.pattern, scene.background, "background"]
    elif draw < 0.9:
        words += ["on", "a", scene.background, "background"]
    return " ".join(words)


YS, XS = np.mgrid[0:SIZE, 0:SIZE] + 0.5
SIDES = (0.0, 2 * np.pi / 3, 4 * np.pi / 3)


def signed_distance(shape, radius, centre, angle):
    """Distance in pixels to the outline of one object, negative inside; [SIZE, SIZE]."""
    dx, dy = XS - centre[0], YS - centre[1]
    if shape == "disc":
        return np.hypot(dx, dy) - radius
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - radius) - 0.36 * radius
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = np.cos(angle) * dy - np.sin(angle) * dx
    if shape == "triangle":
        return np.maximum.reduce([np.cos(a) * u + np.sin(a) * v for a in SIDES]) - 0.75 * radius
    boxes = [np.maximum(np.abs(u) - a, np.abs(v) - b) for a, b in box_sides(shape, radius)]
    return np.minimum.reduce(boxes)


def box_sides(shape, radius):
    """Half lengths of the rectangles that make up a bar or a cross."""
    if shape == "bar":
        return [(1.5 * radius, 0.45 * radius)]
    return [(1.4 * radius, 0.42 * radius), (0.42 * radius, 1.4 * radius)]


def corners(shape, radius, angle):
    """Points, relative to the centre, whose bounding box is the object's; [n, 2]."""
    if shape in ("disc", "ring"):
        reach = radius * (1.36 if shape == "ring" else 1.0)
        return np.array([(reach, reach), (-reach, -reach)])
    if shape == "triangle":
        directions = np.array(SIDES) + np.pi / 3 + angle
        return 1.5 * radius * np.stack([np.cos(directions), np.sin(directions)], 1)
    points = [(p * a, q * b) for a, b in box_sides(shape, radius) for p in (1, -1) for q in (1, -1)]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.array(points) @ turn


def place_objects(scene, rng):
    """Signed distances of all objects, in group order, apart from each other and inside the picture."""
    shapes = [g.shape for g in scene.groups for _ in range(g.count)]
    while True:
        fields, centres = [], []
        for shape in shapes:
            for _ in range(TRIES):
                radius, angle = rng.uniform(*RADII[len(shapes)]), rng.uniform(0, 2 * np.pi)
                reach = corners(shape, radius, angle)
                centre = rng.uniform(0.5 - reach.min(0), SIZE - 0.5 - reach.max(0))
                # Cheaper than the exact test, and it decides most failures.
                if any(math.dist(centre, other) < 1.4 * radius + GAP for other in centres):
                    continue
                field = signed_distance(shape, radius, centre, angle)
                if all((field + other).min() >= GAP for other in fields):
                    fields.append(field)
                    centres.append(centre)
                    break
        if len(fields) == len(shapes) and relation_holds(scene.relation, centres):
            return fields


def relation_holds(relation, centres):
    """Whether the first object lies clearly left of, or above, the second."""
    if relation is None:
        return True
    axis = {"left": 0, "above": 1}[relation]
    return centres[1][axis] - centres[0][axis] >= 6.0


def light_of(pattern, rng):
    """Where the background has its light tone; boolean [SIZE, SIZE]."""
    light = np.zeros((SIZE, SIZE), bool)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE]
    if pattern == "striped":
        along = xs if rng.random() < 0.5 else ys
        light = (along + rng.integers(2 * CELL)) // CELL % 2 == 0
    elif pattern == "checkered":
        shift_x, shift_y = rng.integers(2 * CELL, size=2)
        light = ((xs + shift_x) // CELL + (ys + shift_y) // CELL) % 2 == 0
    elif pattern == "spotted":
        # Spots of 3 x 3 anywhere, never touching each other.
        taken = np.zeros((SIZE + 4, SIZE + 4), bool)
        for _ in range(90):
            x, y = rng.integers(0, SIZE - 2, 2)
            if not taken[y + 1 : y + 6, x + 1 : x + 6].any():
                taken[y + 2 : y + 5, x + 2 : x + 5] = True
        light = taken[2:-2, 2:-2]
    elif pattern != "plain":
        raise ValueError(f"unknown pattern {pattern!r}")
    return light


def draw(scene, rng):
    """One picture of `scene`; u8 [SIZE, SIZE, 3]."""
    dark_tone, light_tone = (np.array(tone, float) for tone in BACKGROUNDS[scene.background])
    image = np.where(light_of(scene.pattern, rng)[..., None], light_tone, dark_tone)
    colours = [np.array(COLOURS[g.colour], float) for g in scene.groups for _ in range(g.count)]
    for field, colour in zip(place_objects(scene, rng), colours):
        cover = np.clip(0.5 - field, 0.0, 1.0)[..., None]
        image = image * (1 - cover) + colour * cover
    return np.rint(image).astype(np.uint8)


def draw_many(n, seed, held_out=False):
    """`n` pictures with captions; (u8 [n, SIZE, SIZE, 3], list of str)."""
    rng = np.random.default_rng(seed)
    images, captions = np.empty((n, SIZE, SIZE, 3), np.uint8), []
    for index in range(n):
        scene = scene_of_split(rng, held_out)
        captions.append(caption_of(scene, rng))
        images[index] = draw(scene, rng)
    return images, captions
