"""What other systems do where bench-scale measures ours: Ray and Dask dispatch tasks, torchft's lighthouse takes beats
and forms quorums. Each peer is a process of its own; prints one JSON object, with `error` for what was not to be had.

    bench_peers.py ray|dask|torchft [--short]
"""

import glob
import importlib.machinery
import importlib.util
import json
import sys
import threading
import time
from datetime import timedelta

SHORT = "--short" in sys.argv
TASKS = 2_000 if SHORT else 10_000
ROUND_TRIPS = 200 if SHORT else 1_000


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))]


def round_trips(once):
    """Milliseconds of one task after another, each awaited: median and 99 %."""
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        once()
        times.append((time.perf_counter() - start) * 1e3)
    return {"round_trip_p50_ms": quantile(times, 0.5), "round_trip_p99_ms": quantile(times, 0.99)}


def nothing(_):
    return None


def bench_ray():
    import ray

    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    started = time.perf_counter() - start
    task = ray.remote(nothing)
    ray.get([task.remote(n) for n in range(500)])
    start = time.perf_counter()
    ray.get([task.remote(n) for n in range(TASKS)])
    rate = TASKS / (time.perf_counter() - start)
    result = {"version": ray.__version__, "start_s": started, "tasks_per_second": rate}
    result |= round_trips(lambda: ray.get(task.remote(0)))
    ray.shutdown()
    return result


def bench_dask():
    import distributed

    start = time.perf_counter()
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    client = distributed.Client(cluster)
    started = time.perf_counter() - start
    client.gather(client.map(nothing, range(500), pure=False))
    start = time.perf_counter()
    client.gather(client.map(nothing, range(TASKS), pure=False))
    rate = TASKS / (time.perf_counter() - start)
    result = {"version": distributed.__version__, "start_s": started, "tasks_per_second": rate}
    result |= round_trips(lambda: client.submit(nothing, 0, pure=False).result())
    client.close()
    cluster.close()
    return result


def torchft_module():
    """The compiled half of torchft. Its Python half wants torch, which the lighthouse does not."""
    package = importlib.util.find_spec("torchft").submodule_search_locations[0]
    path = glob.glob(f"{package}/_torchft*.so")[0]
    loader = importlib.machinery.ExtensionFileLoader("torchft._torchft", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def in_threads(count, work):
    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def quorum_ms(torchft, replicas, tick_ms, rounds):
    """From the first request for a quorum of everybody to the last answer; median of some rounds."""
    server = torchft.LighthouseServer(
        bind="0.0.0.0:0", min_replicas=replicas, join_timeout_ms=60_000, quorum_tick_ms=tick_ms
    )
    patience = timedelta(seconds=60)
    address = "http://127.0.0.1:" + server.address().rsplit(":", 1)[1]
    clients = [torchft.LighthouseClient(address, patience) for _ in range(replicas)]
    barrier = threading.Barrier(replicas)
    asked = [[0.0] * replicas for _ in range(rounds)]
    answered = [[0.0] * replicas for _ in range(rounds)]

    def member(n):
        for step in range(rounds):
            barrier.wait()
            asked[step][n] = time.perf_counter()
            clients[n].quorum(f"replica{n}", patience, address="", store_address="", step=step, world_size=1)
            answered[step][n] = time.perf_counter()

    in_threads(replicas, member)
    server.shutdown()
    times = [(max(answered[step]) - min(asked[step])) * 1e3 for step in range(1, rounds)]
    return quantile(times, 0.5)


def beats_per_second(torchft, replicas, seconds):
    server = torchft.LighthouseServer(bind="0.0.0.0:0", min_replicas=1)
    patience = timedelta(seconds=60)
    address = "http://127.0.0.1:" + server.address().rsplit(":", 1)[1]
    clients = [torchft.LighthouseClient(address, patience) for _ in range(replicas)]
    counts = [0] * replicas
    end = time.perf_counter() + seconds

    def beat(n):
        while time.perf_counter() < end:
            clients[n].heartbeat(f"replica{n}", patience)
            counts[n] += 1

    in_threads(replicas, beat)
    server.shutdown()
    return sum(counts) / seconds


def bench_torchft():
    torchft = torchft_module()
    from importlib.metadata import distributions

    versions = [d.version for d in distributions() if d.name in ("torchft", "torchft-nightly")]
    rounds = 4 if SHORT else 8
    result = {"version": versions[0] if versions else "?"}
    result["beats_per_second"] = beats_per_second(torchft, 64, 2 if SHORT else 5)
    for replicas in (64, 256):
        result[f"quorum_{replicas}_ms"] = quorum_ms(torchft, replicas, 100, rounds)
        result[f"quorum_{replicas}_tick10_ms"] = quorum_ms(torchft, replicas, 10, rounds)
    return result


def main():
    peer = sys.argv[1]
    try:
        result = {"ray": bench_ray, "dask": bench_dask, "torchft": bench_torchft}[peer]()
    except Exception as error:  # Whatever a peer fails with is the answer.
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"peer": peer} | result), flush=True)


if __name__ == "__main__":
    main()
