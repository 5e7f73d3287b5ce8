"""The training set on disk: pictures and captions, drawn once by all cores.

    data.py WORK_DIR
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np

from scenes import draw_many

SHARDS, SHARD_SIZE = 20, 4096


def draw_shard(work, shard):
    """Draws one shard unless it is there already. The seed is the shard's number."""
    path = work / "data" / f"{shard:03}.npz"
    if not path.exists():
        images, captions = draw_many(SHARD_SIZE, seed=shard)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, images=images, captions=np.array(captions))
        partial.rename(path)


def load(work):
    """All pictures, u8 [n, height, width, 3], and all captions."""
    shards = [np.load(work / "data" / f"{shard:03}.npz") for shard in range(SHARDS)]
    images = np.concatenate([s["images"] for s in shards])
    return images, np.concatenate([s["captions"] for s in shards]).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    (work / "data").mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        pool.starmap(draw_shard, [(work, shard) for shard in range(SHARDS)])


if __name__ == "__main__":
    main()
