"""pyarrow's side of `make bench-data`: reads and writes the rows of one file, on request.

    PYTHON tests/python/bench_pyarrow.py FILE OUT

Says its version, then answers each line on standard input with a line on standard output: to `read`, the seconds
that pyarrow takes for states and predictions of FILE; to `write`, the seconds for all of FILE's rows into OUT and
onto the disk. The columns are FixedSizeBinary; nothing is compressed or put into dictionaries, as in FILE.
"""

import os
import sys
import time

import pyarrow
import pyarrow.parquet as parquet


def read(file):
    start = time.perf_counter()
    table = parquet.read_table(file, columns=["latent", "eps_w"])
    seconds = time.perf_counter() - start
    assert all(pyarrow.types.is_fixed_size_binary(field.type) for field in table.schema)
    return seconds


def write(table, out):
    start = time.perf_counter()
    with open(out, "wb") as sink:
        parquet.write_table(table, sink, compression="NONE", use_dictionary=False)
        sink.flush()
        os.fsync(sink.fileno())
    seconds = time.perf_counter() - start
    os.remove(out)
    return seconds


def main():
    file, out = sys.argv[1:]
    table = parquet.read_table(file)
    print(pyarrow.__version__, flush=True)
    for line in sys.stdin:
        seconds = {"read": lambda: read(file), "write": lambda: write(table, out)}[line.strip()]()
        print(seconds, flush=True)


main()
