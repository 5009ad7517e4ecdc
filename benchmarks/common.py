"""What all benchmarks share: rows of results, the machine, its GEMM rate, interleaved timing."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch

MODEL = "smollm2-135m-instruct"
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
"""Where models run; `bench.py` measures everything again on `cuda` where there is a GPU."""
TRUNK, HEAD = 106.2e6, 28.3e6
"""SmolLM2-135M's parameters in linear maps of the trunk, and in the LM head."""


def row(ratio: float, ours: float, peer: float, unit: str, **more: Any) -> dict[str, Any]:
    """One result: our figure, the peer's, and their ratio, larger better unless the unit says otherwise."""
    return {"ratio": ratio, "ours": ours, "peer": peer, "unit": unit} | more


def compare(
    ours: Callable[[], Any], peer: Callable[[], Any], repeats: int = 5, warmup: int = 1
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of peer / ours, run in turn."""
    times = take_turns({"ours": ours, "peer": peer}, repeats, warmup)
    return statistics.median(times["ours"]), statistics.median(times["peer"]), ratio(times, "peer")


def take_turns(contestants: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; all in turn, so that the machine's noise meets all."""
    for _ in range(warmup):
        for work in contestants.values():
            work()
    rounds = [{name: seconds(work) for name, work in contestants.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in contestants}


def ratio(times: dict[str, list[float]], peer: str) -> float:
    """The median over rounds of the peer's seconds over ours."""
    return statistics.median(theirs / mine for mine, theirs in zip(times["ours"], times[peer], strict=True))


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes, until the device is done."""
    started = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def versions(*packages: str) -> dict[str, str]:
    """Versions of a row's peers."""
    return {package: version(package) for package in packages}


def gemm_rate(size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of torch's own product of two square fp32 matrices: the best of some runs, as the limit of this machine.

    On a CPU products with prepacked weights may pass it by a tenth (`lorascope.prepacked`).
    The benchmarked model is fp32 on every device, as its checkpoint is.
    """
    a, b = torch.randn(2, size, size, device=DEVICE)
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeats))


def copy_rate(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes per second read and written by a large copy."""
    source = torch.zeros(megabytes << 18, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * (megabytes << 20) / min(seconds(lambda: target.copy_(source)) for _ in range(repeats))


def roofline(spent: float, flops: float, bytes_moved: float) -> dict[str, float]:
    """The least FLOPs and bytes of a job, and the share of this machine's GEMM and copy rates that it reached.

    Args:
        spent: seconds that the job took.
        bytes_moved: what must be read and written at least (weights once per pass, results), if caches held all else.
    """
    gemm, copy = gemm_rate(), copy_rate()
    return {
        "least_flops": flops,
        "least_bytes": bytes_moved,
        "gemm_rate": gemm,
        "copy_rate": copy,
        "share_of_gemm_limit": flops / spent / gemm,
        "share_of_copy_limit": bytes_moved / spent / copy,
    }


class _Mallinfo(ctypes.Structure):
    """What glibc's `mallinfo2` gives, in its order."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def allocated_memory() -> float:
    """Memory that this process has allocated and not given back, GiB: what a job holds at a time.

    On a GPU by torch's count. Else by glibc's own where there is one, or resident memory that is no mapped file, which
    also has what was freed and kept for the next allocation.
    """
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() / 2**30
    try:
        counts = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        memory = psutil.Process().memory_info()
        return float(memory.rss - getattr(memory, "shared", 0)) / 2**30
    counts.restype = _Mallinfo
    found = counts()
    return float(found.uordblks + found.hblkhd) / 2**30


@contextmanager
def allocated_peak() -> Iterator[list[float]]:
    """Inside, the most that this process has allocated at a time, GiB, in the list that it gives; seen every 5 ms."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found, stop = [0.0], Event()

    def look() -> None:
        while not stop.wait(0.005):
            found[0] = max(found[0], allocated_memory())

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        if DEVICE == "cuda":
            found[0] = torch.cuda.max_memory_allocated() / 2**30


def peak_memory() -> float:
    """Largest resident size of this process so far, or most memory allocated on the GPU, GiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine() -> str:
    """One line on where the numbers were made."""
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE == "cuda" else ""
    cpu = f"{os.cpu_count()} CPUs ({cpu_name()}, {torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.machine()}, {cpu}{gpu}, torch {torch.__version__}"


def cpu_name() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unnamed")


def main(measure: Callable[[Path], dict[str, Any]]) -> None:
    """Run one file of benchmarks: `FILE STUDY`, the rows as JSON on the last line of stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print_rows(measure(options.study))


def print_rows(rows: dict[str, Any]) -> None:
    """The rows and the machine, as the last line of stdout."""
    print(json.dumps(rows | {"machine": machine()}))
