"""What `make bench-allreduce` measures the ring against: all-reduce over Gloo, as PyTorch's process groups use it.

    bench_gloo.py RANK WORLD STORE

One process per rank, which find each other by the file STORE. Says `ready`, then reads a request per line and answers
each with a number:

    check               the sum over a known buffer, which must be the ring's too
    sum BYTES REPEATS   seconds of one all-reduce of so many bytes of f32, the mean over the repeats
"""

import sys
import time

try:
    import torch
    import torch.distributed as dist
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install torch==2.11.0")


def check(rank):
    flat = (torch.arange(1000) % 7 + rank + 1).to(torch.float32)
    dist.all_reduce(flat)
    return flat.sum(dtype=torch.float64).item()


def measure(size, repeats):
    flat = torch.ones(size // 4)
    # Everybody is here, and has its memory.
    dist.all_reduce(flat)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(flat)
    return (time.perf_counter() - start) / repeats


def main():
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["check"]:
                number = check(rank)
            case ["sum", size, repeats]:
                number = measure(int(size), int(repeats))
            case _:
                sys.exit(f"`{line.strip()}` is no request")
        print(repr(number), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
