"""Which container for the scalar store? Sequential read, row shuffle and single-trace read, measured.

    python benchmarks/store_formats.py [--tokens 200000] [--columns 210] [--repeats 5] [--json FILE]

Synthetic scalars in float16, the same for every container, read warm (from the page cache) as the stages read
them: to float32, scaled per column. Needs `zarr` beside the project; a container that is not installed is named.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lorascope.store import Store, decode_half
from lorascope.store_writer import StorePlan, StoreWriter, plan_shards

TRACE = 500  # tokens per trace
BATCH = 4096  # rows of a shuffled batch
ROWS = 4096  # rows of a sequential chunk
SHARD = 1 << 16


@dataclass(frozen=True)
class Reader:
    """The three reads of one container, each giving float32."""

    sequential: Callable[[], Iterator[np.ndarray]]
    rows: Callable[[np.ndarray], np.ndarray]
    trace: Callable[[int, int], np.ndarray]


def write_ours(folder: Path, z: np.ndarray, scale: np.ndarray) -> None:
    lengths = [TRACE] * (len(z) // TRACE)
    plan = StorePlan(
        addresses=[f"L{i}.gate" for i in range(z.shape[1])],
        effect_per_scalar=[1.0] * z.shape[1],
        trace_ids=[str(i) for i in range(len(lengths))],
        lengths=lengths,
        response_starts=[0] * len(lengths),
        shards=[[list(range(first, stop))] for first, stop in plan_shards(lengths, SHARD)],
        about={},
    )
    writer = StoreWriter(folder, plan)
    writer.calibrate(np.full(z.shape[1], 60.0, np.float32))
    for number in writer.missing():
        shard = writer.begin(number)
        for i in plan.shards[number][0]:
            part = z[i * TRACE : (i + 1) * TRACE].astype(np.float32)
            writer.put(shard, i, part, np.zeros(TRACE), np.ones(TRACE), np.zeros(TRACE, bool))
        writer.commit(shard)
    writer.finish()


def read_ours(folder: Path, scale: np.ndarray) -> Reader:
    store = Store.open(folder)
    return Reader(
        lambda: (z for _, z in store.chunks(ROWS)), store.rows, lambda first, stop: store.trace(first // TRACE)[1]
    )


def write_arrow(folder: Path, z: np.ndarray, scale: np.ndarray) -> None:
    kind = pa.list_(pa.float16(), z.shape[1])
    schema = pa.schema([("z", kind)])
    with pa.OSFile(str(folder / "z.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for first in range(0, len(z), SHARD):
            flat = pa.array(z[first : first + SHARD].reshape(-1))
            writer.write_batch(pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, z.shape[1])], schema=schema))


def read_arrow(folder: Path, scale: np.ndarray) -> Reader:
    """Through Arrow's own calls; rows are taken per record batch."""
    source = pa.ipc.open_file(pa.memory_map(str(folder / "z.arrow")))
    batches = [source.get_batch(i).column(0) for i in range(source.num_record_batches)]

    def decode(part: pa.Array) -> np.ndarray:
        flat = part.flatten().to_numpy(zero_copy_only=True)
        return decode_half(flat.reshape(len(part), len(scale)), scale)

    def sequential() -> Iterator[np.ndarray]:
        for batch in batches:
            for first in range(0, len(batch), ROWS):
                yield decode(batch.slice(first, ROWS))

    def rows(index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), len(scale)), np.float32)
        shard = index // SHARD
        for number in np.unique(shard):
            where = np.flatnonzero(shard == number)
            out[where] = decode(batches[number].take(pa.array(index[where] - number * SHARD)))
        return out

    def trace(first: int, stop: int) -> np.ndarray:
        number, start = divmod(first, SHARD)
        parts = [decode(batches[number].slice(start, stop - first))]
        if len(parts[0]) < stop - first:
            parts.append(decode(batches[number + 1].slice(0, stop - first - len(parts[0]))))
        return np.concatenate(parts)

    return Reader(sequential, rows, trace)


def write_zarr(folder: Path, z: np.ndarray, scale: np.ndarray, **options: Any) -> None:
    import zarr

    array = zarr.create_array(
        str(folder / "z.zarr"), shape=z.shape, dtype=z.dtype, zarr_format=3, overwrite=True, **options
    )
    array[:] = z


def write_zarr_plain(folder: Path, z: np.ndarray, scale: np.ndarray) -> None:
    write_zarr(folder, z, scale, chunks=(ROWS, z.shape[1]), compressors=None)


def write_zarr_zstd(folder: Path, z: np.ndarray, scale: np.ndarray) -> None:
    write_zarr(folder, z, scale, chunks=(ROWS, z.shape[1]))


def write_zarr_sharded(folder: Path, z: np.ndarray, scale: np.ndarray) -> None:
    write_zarr(folder, z, scale, chunks=(256, z.shape[1]), shards=(SHARD, z.shape[1]), compressors=None)


def read_zarr(folder: Path, scale: np.ndarray) -> Reader:
    import zarr

    array = zarr.open_array(str(folder / "z.zarr"), mode="r")

    def decode(part: np.ndarray) -> np.ndarray:
        return decode_half(part, scale)

    def sequential() -> Iterator[np.ndarray]:
        for first in range(0, array.shape[0], ROWS):
            yield decode(array[first : first + ROWS])

    def rows(index: np.ndarray) -> np.ndarray:
        return decode(array.oindex[index])

    return Reader(sequential, rows, lambda first, stop: decode(array[first:stop]))


Write = Callable[[Path, np.ndarray, np.ndarray], None]
Open = Callable[[Path, np.ndarray], Reader]
CONTAINERS: dict[str, tuple[Write, Open]] = {
    "safetensors shards, mapped": (write_ours, read_ours),
    "Arrow IPC, mapped": (write_arrow, read_arrow),
    "Zarr v3, plain": (write_zarr_plain, read_zarr),
    "Zarr v3, zstd (default)": (write_zarr_zstd, read_zarr),
    "Zarr v3, sharded, plain": (write_zarr_sharded, read_zarr),
}


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median over repeats, after one warm-up."""
    action()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(write: Write, open_: Open, z: np.ndarray, scale: np.ndarray, repeats: int) -> dict[str, float]:
    """Write, check that what is read is what was written, and time the reads."""
    rng = np.random.default_rng(1)
    shuffled = rng.permutation(len(z))[: 8 * BATCH]
    traces = rng.integers(0, len(z) // TRACE, 50) * TRACE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        write(folder, z, scale)
        writing = time.perf_counter() - started
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        reader = open_(folder, scale)
        wanted = z[shuffled[:BATCH]].astype(np.float32) * scale
        np.testing.assert_allclose(reader.rows(shuffled[:BATCH]), wanted, rtol=1e-3, atol=1e-6)

        def sequential() -> None:
            for part in reader.sequential():
                part[0, 0]

        def shuffle() -> None:
            for first in range(0, len(shuffled), BATCH):
                reader.rows(shuffled[first : first + BATCH])

        def single() -> None:
            for first in traces:
                reader.trace(int(first), int(first) + TRACE)

        return {
            "sequential_scalars_per_s": z.size / median_seconds(sequential, repeats),
            "shuffled_rows_per_s": len(shuffled) / median_seconds(shuffle, repeats),
            "trace_ms": median_seconds(single, repeats) / len(traces) * 1e3,
            "write_s": writing,
            "bytes_per_scalar": size / z.size,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=210)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")
    arguments = parser.parse_args()
    tokens = arguments.tokens // TRACE * TRACE
    z = np.random.default_rng(0).standard_normal((tokens, arguments.columns), np.float32).astype(np.float16)
    scale = np.ones(arguments.columns, np.float32)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{tokens} tokens x {arguments.columns} scalars, float16, warm, median of {arguments.repeats}; {machine}\n")
    print(f"{'container':28}{'Mscalars/s':>12}{'rows/s':>12}{'trace ms':>10}{'write s':>9}{'bytes':>7}")
    results = {}
    for name, (write, open_) in CONTAINERS.items():
        if name.startswith("Zarr") and importlib.util.find_spec("zarr") is None:
            print(f"{name:28} not installed: pip install zarr")
            continue
        found = results[name] = measure(write, open_, z, scale, arguments.repeats)
        print(
            f"{name:28}{found['sequential_scalars_per_s'] / 1e6:12.0f}{found['shuffled_rows_per_s']:12.0f}"
            f"{found['trace_ms']:10.2f}{found['write_s']:9.2f}{found['bytes_per_scalar']:7.2f}"
        )
    if arguments.json:
        report = {"tokens": tokens, "columns": arguments.columns, "machine": machine, "containers": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
