"""The content of `scorer.json`: the palette, the words and the thresholds by which pictures are judged."""

from scenes import BACKGROUNDS, COLOURS, COUNTS, PATTERNS, RELATIONS, SHAPES, SIZE


def rules():
    """The scorer's rules. The thresholds lie midway between what drawn shapes and patterns measure."""
    return {
        "format": "distillery-scene-scorer",
        "version": 1,
        "image": {"width": SIZE, "height": SIZE},
        "palette": {
            "objects": {name: list(rgb) for name, rgb in COLOURS.items()},
            "backgrounds": {
                name: {"dark": list(dark), "light": list(light)}
                for name, (dark, light) in BACKGROUNDS.items()
            },
        },
        "words": {
            "count": {word: count for count, word in COUNTS.items()} | {"an": 1, "one": 1},
            "colour": {name: name for name in COLOURS},
            "shape": {word: name for name, plural in SHAPES.items() for word in (name, plural)},
            "relation": {name: name for name in RELATIONS},
            "background": {name: name for name in BACKGROUNDS},
            "pattern": {name: name for name in PATTERNS},
        },
        "object": {"min_brightness": 165, "min_area": 14},
        "shape": {
            "ring_min_empty": 4,
            "bar_min_elongation": 3.0,
            "triangle_min_asymmetry": 0.036,
            "cross_min_spread": 1.11,
        },
        "relation": {"min_distance": 3.0},
        "background": {"min_pixels": 100},
        "pattern": {"plain_max_light": 0.06, "striped_max_ratio": 0.4, "checkered_min_light": 0.4},
    }
