"""Writes `golden.json`: pictures, good and bad, with the verdicts that every scorer must reach.

    golden.py TEACHER_DIR
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np

from scenes import BACKGROUNDS, SIZE, draw_many
from scorer import Scorer


def cases(rng):
    """(caption, picture) pairs: true, mismatched, noisy, blurred, mixed and empty."""
    images, captions = draw_many(40, seed=50_000, held_out=True)
    yield from zip(captions[:14], images[:14])
    yield from zip(captions[14:20], images[15:21])
    for index in range(20, 25):
        noise = rng.normal(0, 40, images[index].shape)
        yield captions[index], np.clip(images[index] + noise, 0, 255).astype(np.uint8)
    for index in range(25, 30):
        wide = np.pad(images[index].astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
        blurred = sum(wide[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)) // 9
        yield captions[index], blurred.astype(np.uint8)
    for index in range(30, 34):
        yield captions[index], (images[index] // 2 + images[index + 1] // 2 + 20).astype(np.uint8)
    yield captions[35], np.zeros((SIZE, SIZE, 3), np.uint8)
    yield captions[36], np.full((SIZE, SIZE, 3), 255, np.uint8)
    plain = np.broadcast_to(np.array(BACKGROUNDS["navy"][0], np.uint8), (SIZE, SIZE, 3))
    yield "A red disc on a plain navy background", plain
    yield captions[37], rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    yield "three rings", images[38]
    yield "a disc above a bar on a striped background", images[39]


def main():
    folder = Path(sys.argv[1]) / "scorer"
    scorer = Scorer(folder / "scorer.json")
    golden = []
    for caption, image in cases(np.random.default_rng(0)):
        verdicts = scorer.verdicts(image, caption)
        golden.append(
            {
                "caption": caption,
                "right": sum(right for _, right in verdicts),
                "total": len(verdicts),
                "verdicts": [[name, bool(right)] for name, right in verdicts],
                "pixels": base64.b64encode(np.ascontiguousarray(image).tobytes()).decode(),
            }
        )
    document = {"width": SIZE, "height": SIZE, "cases": golden}
    (folder / "golden.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
