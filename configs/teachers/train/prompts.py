"""Writes the prompt lists.

    prompts.py PROMPTS_DIR
"""

import sys
from pathlib import Path

import numpy as np

from scenes import SINGLE_GROUP, caption_of, scene_of_split

LISTS = {
    "scenes-train.txt": (4000, 20_000, False),
    "scenes-holdout.txt": (500, 30_000, True),
    "scenes-preview.txt": (8, 40_000, True),
}


def captions(n, seed, held_out):
    """`n` captions with the training set's share of single groups.

    Held-out ones differ from each other and name the background, without which nothing is held out.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    while len(drawn) < n:
        n_groups = 1 if rng.random() < SINGLE_GROUP else 2
        scene = scene_of_split(rng, held_out)
        while len(scene.groups) != n_groups:
            scene = scene_of_split(rng, held_out)
        caption = caption_of(scene, rng)
        if not held_out or "background" in caption and caption not in drawn:
            drawn.append(caption)
    return drawn


if __name__ == "__main__":
    for name, arguments in LISTS.items():
        (Path(sys.argv[1]) / name).write_text("\n".join(captions(*arguments)) + "\n")
