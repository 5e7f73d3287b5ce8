"""Reads from a picture how much of its caption came true.

The rules are data (`scorer.json`, which travels with the teacher) and the
arithmetic is fixed in prose (`SPEC.md`, beside it); this is the reference
implementation of both. Everything that decides is integer arithmetic or one f64
comparison, so that another implementation gives the same verdicts.

Run as a program it scores PNG files: `scorer.py scorer.json "a red disc" picture.png`.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clause:
    """A group of objects as the caption states it; `colour` is None when unstated."""

    count: int
    colour: str | None
    shape: str


@dataclass(frozen=True)
class Caption:
    """What a caption states."""

    clauses: tuple[Clause, ...]
    relation: str | None
    background: str | None
    pattern: str | None


@dataclass(frozen=True)
class Object:
    """A connected bright region, as read from the picture."""

    area: int
    colour: str
    shape: str
    x: float
    y: float


class Scorer:
    """Judges pictures by the rules of one `scorer.json`."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.rules = json.load(file)
        if (self.rules["format"], self.rules["version"]) != ("distillery-scene-scorer", 1):
            raise ValueError(f"{path}: not a distillery-scene-scorer of version 1")

    def score(self, image, caption):
        """(right, total) attributes of `caption` in `image`, u8 [height, width, 3]."""
        verdicts = self.verdicts(image, caption)
        return sum(right for _, right in verdicts), len(verdicts)

    def verdicts(self, image, caption):
        """Every stated attribute with whether it is right: [(name, bool)], in the order of the specification."""
        stated = self.read_caption(caption)
        bright = image.max(2) >= self.rules["object"]["min_brightness"]
        objects = self.find_objects(image, bright)
        named = {clause.colour for clause in stated.clauses}
        stray = None not in named and any(o.colour not in named for o in objects)
        verdicts = []
        for clause in stated.clauses:
            meant = [o for o in objects if clause.colour in (None, o.colour)]
            verdicts.append(("count", len(meant) == clause.count))
            if clause.colour is not None:
                verdicts.append(("colour", bool(meant) and not stray))
            verdicts.append(("shape", bool(meant) and all(o.shape == clause.shape for o in meant)))
        if stated.relation is not None:
            verdicts.append(("relation", self.relation_holds(stated, objects)))
        if stated.background is not None or stated.pattern is not None:
            background, pattern = self.read_background(image, bright)
            if stated.background is not None:
                verdicts.append(("background", background == stated.background))
            if stated.pattern is not None:
                verdicts.append(("pattern", pattern == stated.pattern))
        return verdicts

    def read_caption(self, caption):
        """The caption's attributes; words without a meaning are skipped."""
        words = self.rules["words"]
        clauses, count, colour = [], 1, None
        relation = background = pattern = None
        for word in caption.lower().split():
            if word in words["count"]:
                count = words["count"][word]
            elif word in words["colour"]:
                colour = words["colour"][word]
            elif word in words["shape"]:
                clauses.append(Clause(count, colour, words["shape"][word]))
                count, colour = 1, None
            elif word in words["relation"]:
                relation = words["relation"][word]
            elif word in words["background"]:
                background = words["background"][word]
            elif word in words["pattern"]:
                pattern = words["pattern"][word]
        return Caption(tuple(clauses), relation, background, pattern)

    def find_objects(self, image, bright):
        """Bright 4-connected regions that are large enough, in raster order of their first pixel."""
        height, width = bright.shape
        seen = np.zeros_like(bright)
        objects = []
        for y, x in zip(*np.nonzero(bright)):
            if seen[y, x]:
                continue
            seen[y, x] = True
            pixels, frontier = [], [(int(y), int(x))]
            while frontier:
                py, px = frontier.pop()
                pixels.append((py, px))
                for qy, qx in ((py - 1, px), (py + 1, px), (py, px - 1), (py, px + 1)):
                    if 0 <= qy < height and 0 <= qx < width and bright[qy, qx] and not seen[qy, qx]:
                        seen[qy, qx] = True
                        frontier.append((qy, qx))
            if len(pixels) >= self.rules["object"]["min_area"]:
                objects.append(self.describe(image, pixels))
        return objects

    def describe(self, image, pixels):
        """Colour, shape and place of one region."""
        n = len(pixels)
        sums = [sum(int(image[y, x, c]) for y, x in pixels) for c in range(3)]
        colour = nearest(self.rules["palette"]["objects"], sums, n)
        sx, sy = sum(x for _, x in pixels), sum(y for y, _ in pixels)
        return Object(n, colour, self.shape_of(pixels, sx, sy), sx / n, sy / n)

    def shape_of(self, pixels, sx, sy):
        """Shape by a hole at the centre, elongation, spread and three-fold asymmetry."""
        rule, n = self.rules["shape"], len(pixels)
        # Coordinates are multiplied by n, so that everything up to the last division is an integer.
        inside = set(pixels)
        cy, cx = (2 * sy + n) // (2 * n), (2 * sx + n) // (2 * n)
        empty = sum((cy + dy, cx + dx) not in inside for dy in (-1, 0, 1) for dx in (-1, 0, 1))
        if empty >= rule["ring_min_empty"]:
            return "ring"
        points = [(n * x - sx, n * y - sy) for y, x in pixels]
        mxx = sum(u * u for u, _ in points)
        myy = sum(v * v for _, v in points)
        mxy = sum(u * v for u, v in points)
        m3r = sum(u * u * u - 3 * u * v * v for u, v in points)
        m3i = sum(3 * u * u * v - v * v * v for u, v in points)
        xx, yy, xy = mxx / n**3 + 1 / 12, myy / n**3 + 1 / 12, mxy / n**3
        root = ((xx - yy) ** 2 + 4 * xy * xy) ** 0.5
        elongation = (xx + yy + root) / (xx + yy - root)
        spread = 2 * np.pi * (xx + yy) / n
        asymmetry = ((m3r / n**4) ** 2 + (m3i / n**4) ** 2) ** 0.5 / n**1.5
        if elongation >= rule["bar_min_elongation"]:
            return "bar"
        if asymmetry >= rule["triangle_min_asymmetry"]:
            return "triangle"
        return "cross" if spread >= rule["cross_min_spread"] else "disc"

    def relation_holds(self, stated, objects):
        """Whether the largest object of the first clause lies left of, or above, that of the second."""
        places = []
        for clause in stated.clauses[:2]:
            meant = [o for o in objects if clause.colour in (None, o.colour)]
            if not meant:
                return False
            # max keeps the first of equals, which is the first in raster order.
            largest = max(meant, key=lambda o: o.area)
            places.append(largest.x if stated.relation == "left" else largest.y)
        return len(places) == 2 and places[1] - places[0] >= self.rules["relation"]["min_distance"]

    def read_background(self, image, bright):
        """(family, pattern) of what lies clear of every bright pixel; (None, None) when too little does."""
        rule = self.rules["background"]
        height, width = bright.shape
        padded = np.pad(bright, 1)
        clear = np.ones_like(bright)
        for dy in range(3):
            for dx in range(3):
                clear &= ~padded[dy : dy + height, dx : dx + width]
        if clear.sum() < rule["min_pixels"]:
            return None, None
        families = self.rules["palette"]["backgrounds"]
        tones = {f"{name} {tone}": rgb for name, pair in families.items() for tone, rgb in pair.items()}
        votes = dict.fromkeys(families, 0)
        for pixel in image[clear]:
            votes[nearest(tones, [int(v) for v in pixel], 1).split()[0]] += 1
        family = max(votes, key=votes.get)
        pair = families[family]
        distance = {
            tone: ((image.astype(np.int64) - np.array(rgb)) ** 2).sum(2) for tone, rgb in pair.items()
        }
        light = distance["light"] < distance["dark"]
        return family, self.pattern_of(light, clear)

    def pattern_of(self, light, clear):
        """Pattern by the share of light pixels and by how often the tone changes along each axis."""
        rule = self.rules["pattern"]
        n, n_light = int(clear.sum()), int((light & clear).sum())
        if n_light < rule["plain_max_light"] * n:
            return "plain"
        across = clear[:, 1:] & clear[:, :-1]
        down = clear[1:] & clear[:-1]
        rate_x = int((across & (light[:, 1:] != light[:, :-1])).sum()) / max(int(across.sum()), 1)
        rate_y = int((down & (light[1:] != light[:-1])).sum()) / max(int(down.sum()), 1)
        if min(rate_x, rate_y) < rule["striped_max_ratio"] * max(rate_x, rate_y):
            return "striped"
        return "checkered" if n_light >= rule["checkered_min_light"] * n else "spotted"


def nearest(palette, sums, n):
    """Name of the palette colour nearest to the mean `sums / n`; the first of equals."""
    return min(palette, key=lambda name: sum((s - n * p) ** 2 for s, p in zip(sums, palette[name])))


def main():
    from PIL import Image

    rules, caption, *paths = sys.argv[1:]
    scorer = Scorer(rules)
    for path in paths:
        verdicts = scorer.verdicts(np.asarray(Image.open(path).convert("RGB")), caption)
        right = sum(ok for _, ok in verdicts)
        print(f"{path}: {right}/{len(verdicts)} " + " ".join(f"{k}={'yes' if v else 'no'}" for k, v in verdicts))


if __name__ == "__main__":
    main()
