"""The scalar store: every direction's scalar on every token of a corpus at 2 bytes, memory-mapped.

A store is the folder `scalars/CORPUS/SOURCE/` of a study:

    plan.json           directions, traces, which traces share a shard and a batch; fixed before recording
    calibration.json    one power-of-two scale per direction, from the first batch
    shard-*.safetensors z [T, N] float16 (scalar / scale), with tokens, segments, sinks, clipping counts
    tokens.safetensors  token ids, segments and sinks of the whole corpus
    index.json          written last: checksums of all files, counts, medians; without it the recording is unfinished

A new recording goes to `.SOURCE.part` beside a finished store until it is finished too, and then takes its place.

Traces keep the order of the corpus, so a trace's store index is its index in `traces/CORPUS.jsonl` unless
traces were dropped. Shape legend: T tokens, N directions.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import MissingStage, RunFailed
from lorascope.traces import SEGMENT_NAMES

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FORMAT = 1
PLAN, CALIBRATION, TOKENS, INDEX = "plan.json", "calibration.json", "tokens.safetensors", "index.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
CHUNK_SCALARS = 1 << 20  # a chunk of 4 MB in float32 stays in the cache while it is used
OPEN_SHARDS = 16
"""Shards that a store keeps mapped: each is an open file, of which a process may have 256, and a study ten stores."""


MEDIAN_TOKENS = 20_000
"""Most tokens that a direction's median is taken over, spread evenly."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def store_folder(study_path: Path, corpus: str, source: str) -> Path:
    """Where a study keeps the scalars of a corpus from one source (adapter, base, ...)."""
    return study_path / "scalars" / corpus / source


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset of its data.

    Raises:
        RunFailed: the file is missing or not a whole safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else None
        if isinstance(header, dict):
            ends = [spec["data_offsets"][1] for name, spec in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) == size:
                return header, 8 + length
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFailed(f"{path} is missing or damaged; record this corpus again.") from error
    raise RunFailed(f"{path} is damaged; record this corpus again.")


def map_tensors(path: Path, only: str | None = None) -> dict[str, Array]:
    """Every tensor of a safetensors file, or `only` the one of a name, as a read-only memory map.

    Raises:
        RunFailed: the file is missing or damaged.
    """
    header, start = read_header(path)
    tensors: dict[str, Array] = {}
    for name, spec in header.items():
        if name != "__metadata__" and only in (None, name):
            dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
            if 0 in shape:  # a memory map cannot be empty
                tensors[name] = np.zeros(shape, dtype)
            else:
                tensors[name] = np.memmap(path, dtype, "r", start + spec["data_offsets"][0], shape)
    return tensors


def fetch_rows(mapped: Array, rows: npt.NDArray[np.int64]) -> None:
    """Have the system begin to read rows (in rising order) of a memory map, all at once.

    As they are used, one after the other, each would wait for the disk, and for all that the system reads ahead around
    it. Does nothing where there is no such call.
    """
    if (
        len(rows)
        and isinstance(mapped, np.memmap)
        and isinstance(mapped.base, mmap.mmap)
        and hasattr(mmap, "MADV_WILLNEED")
    ):
        begin = mapped.offset % mmap.ALLOCATIONGRANULARITY  # where the array begins in its map
        for first, stop in page_runs(begin + rows * mapped.strides[0], mapped.strides[0], mmap.PAGESIZE):
            mapped.base.madvise(mmap.MADV_WILLNEED, first, stop - first)


def page_runs(starts: npt.NDArray[np.int64], width: int, page: int) -> list[tuple[int, int]]:
    """Runs of pages, as (first byte, end), that hold `width` bytes from each of some starts in rising order."""
    firsts, lasts = starts // page, (starts + width - 1) // page
    cuts = np.flatnonzero(firsts[1:] > lasts[:-1] + 1)
    begins, ends = firsts[[0, *(cuts + 1)]] * page, (lasts[[*cuts, -1]] + 1) * page
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def map_scalars(folder: Path, number: int) -> Array:
    """The scalars of a shard as a memory map [T_shard, N] of float16.

    Raises:
        RunFailed: the file is missing or damaged.
    """
    return map_tensors(folder / shard_name(number), "z")["z"]


def hash_file(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from byte `start` on."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the store; `RunFailed` when it cannot be read."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFailed(f"{path} is missing or damaged; record this corpus again.") from error
    if not isinstance(loaded, dict):
        raise RunFailed(f"{path} is damaged; record this corpus again.")
    return loaded


def decode_half(half_TN: Array, scale_N: Floats) -> Floats:
    """float32 of finite float16 numbers, times a scale of at most 2^15 per column.

    Sign and magnitude are shifted to where float32 has them; several times as fast as numpy's own conversion.
    """
    bits_TN = np.asarray(half_TN).view(np.int16).astype(np.int32)
    bits_TN <<= 13
    bits_TN &= np.int32(~0x70000000)  # clears the copies of the sign that the wider integer brought
    z_TN = bits_TN.view(np.float32)
    z_TN *= scale_N * np.float32(2.0**112)  # the exponents' offsets differ by 112
    return z_TN


@dataclass(frozen=True)
class Store:
    """A finished recording, opened for reading. Build it with `Store.open`."""

    folder: Path
    plan: dict[str, Any]
    index: dict[str, Any]
    scale_N: Floats
    starts: npt.NDArray[np.int64]
    """First token of each shard, and the number of tokens at the end."""

    @staticmethod
    def open(folder: Path) -> "Store":
        """Open a store; its shards are mapped when they are first read.

        Raises:
            MissingStage: nothing was recorded, or the recording was cut off.
            RunFailed: a file is missing or of the wrong size.
        """
        corpus, source = folder.parent.name, folder.name
        study = folder.parent.parent.parent
        if not (folder / INDEX).is_file():
            state = "was cut off" if (folder / PLAN).is_file() else "has not been run"
            raise MissingStage(
                f"The recording of {corpus} from {source} {state}; "
                f"run: lorascope record {study} --corpus {corpus} --source {source}"
            )
        index = read_json(folder / INDEX)
        if index.get("format") != FORMAT:
            raise RunFailed(f"{folder} has a store of another version; record this corpus again.")
        for name, entry in index["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise RunFailed(f"{file} is missing or damaged; record this corpus again.")
        return Store.of(folder, index)

    @staticmethod
    def of(folder: Path, index: dict[str, Any]) -> "Store":
        """The store of files that are all there, with what its index says or will say."""
        plan = read_json(folder / PLAN)
        tokens = [sum(plan["lengths"][i] for batch in shard for i in batch) for shard in plan["shards"]]
        starts = np.cumsum([0, *tokens], dtype=np.int64)
        scale = read_json(folder / CALIBRATION)["scale"]
        return Store(folder, plan, index, np.array(scale, np.float32), starts)

    @cached_property
    def addresses(self) -> list[str]:
        """Address of each column."""
        return list(self.plan["addresses"])

    @cached_property
    def effect_per_scalar(self) -> Floats:
        """s·‖b‖ per direction, float32 [N]: the effect is this times the scalar."""
        return np.array(self.plan["effect_per_scalar"], np.float32)

    @cached_property
    def trace_ids(self) -> list[str]:
        """Id of each trace in store order."""
        return list(self.plan["trace_ids"])

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    @property
    def n_traces(self) -> int:
        """Number of traces."""
        return len(self.plan["trace_ids"])

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """First token of each trace, int64 [n_traces + 1]."""
        return np.cumsum([0, *self.plan["lengths"]], dtype=np.int64)

    @cached_property
    def response_start(self) -> npt.NDArray[np.int32]:
        """Position of the first assistant token in each trace, int32 [n_traces]."""
        return np.array(self.plan["response_starts"], np.int32)

    @cached_property
    def side(self) -> dict[str, Array]:
        """Memory maps of what goes beside the scalars."""
        return map_tensors(self.folder / TOKENS)

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Token ids, int32 [T]."""
        return self.side["tokens"]

    @cached_property
    def segments(self) -> npt.NDArray[np.uint8]:
        """Segment codes (special, prompt, think, answer), uint8 [T]."""
        return self.side["segments"]

    @cached_property
    def sink(self) -> npt.NDArray[np.bool_]:
        """Attention sinks by the rule in `index["about"]`, bool [T]."""
        return self.side["sink"].view(np.bool_)

    @cached_property
    def ordinary(self) -> npt.NDArray[np.bool_]:
        """Tokens that are neither special nor a sink, bool [T]."""
        return np.asarray((self.segments != 0) & ~self.sink)

    @cached_property
    def ordinary_by_segment(self) -> list[int]:
        """How many ordinary tokens each segment has, by its code."""
        known = self.index.get("ordinary_by_segment")
        return known or np.bincount(self.segments[self.ordinary], minlength=len(SEGMENT_NAMES)).tolist()

    @cached_property
    def medians(self) -> npt.NDArray[np.float64]:
        """Median scalar of each direction over at most `MEDIAN_TOKENS` ordinary tokens, float64 [N]; 0 without any.

        The index has it; only recordings from before it did are read for it.
        """
        if known := self.index.get("medians"):
            return np.array(known, np.float64)
        ordinary = np.flatnonzero(self.ordinary)
        if not len(ordinary):
            return np.zeros(len(self.scale_N))
        chosen = ordinary[:: -(-len(ordinary) // MEDIAN_TOKENS)]
        z_TN = self.visit(chosen)
        parts = [z_TN[:, first : first + 32] for first in range(0, z_TN.shape[1], 32)]  # twice as much at a time only
        return np.concatenate([np.median(part.astype(np.float64), axis=0) for part in parts])

    @cached_property
    def shard(self) -> Callable[[int], Array]:
        """From a shard's number to its memory map [T_shard, N] of float16; the last `OPEN_SHARDS` stay open.

        Raises:
            RunFailed: the file is damaged.
        """
        return lru_cache(OPEN_SHARDS)(partial(map_scalars, self.folder))  # not of self, which would never be freed

    def token_traces(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Store index of the trace of each given token."""
        return (np.searchsorted(self.offsets, positions, side="right") - 1).astype(np.int32)

    def assistant(self, first: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the tokens [first, stop) are the assistant's, from its first one in their trace on."""
        positions = np.arange(first, stop)
        trace_T = self.token_traces(positions)
        return np.asarray(positions >= self.offsets[trace_T] + self.response_start[trace_T])

    def assistant_mean(self) -> Floats:
        """Mean scalars over the assistant's tokens, float32 [N]; 0 without such tokens."""
        total, count = np.zeros(len(self.scale_N)), 0
        for start, z_TN in self.chunks():
            inside_T = self.assistant(start, start + len(z_TN))
            total += z_TN[inside_T].sum(axis=0, dtype=np.float64)
            count += int(inside_T.sum())
        return (total / max(count, 1)).astype(np.float32)

    def decode(self, half_TN: Array) -> Floats:
        """Stored half-precision numbers as scalars in float32."""
        return decode_half(half_TN, self.scale_N)

    def chunks(self, rows: int | None = None) -> Iterator[tuple[int, Floats]]:
        """Yield (first token, z_TN float32) over the whole corpus in order; a chunk may cut a trace.

        Args:
            rows: most tokens per chunk (default: as fit the cache).
        """
        rows = rows or max(1, CHUNK_SCALARS // len(self.scale_N))
        for number, start in enumerate(self.starts[:-1]):
            # a map of its own, dropped after its shard: pages that were read do not pile up in this process
            half_TN = map_scalars(self.folder, number)
            for first in range(0, len(half_TN), rows):
                yield int(start) + first, self.decode(half_TN[first : first + rows])

    def rows(self, index: npt.NDArray[np.integer[Any]]) -> Floats:
        """Scalars of any tokens in any order, float32 [len(index), N]."""
        return self.gather(index, self.shard)

    def visit(self, index: npt.NDArray[np.integer[Any]]) -> Floats:
        """`rows` through maps of its own, dropped at once: in a server, pages that were read would pile up. The disk is
        asked for all of them before the first is used."""
        return self.gather(index, partial(map_scalars, self.folder), fetch_rows)

    def gather(
        self,
        index: npt.NDArray[np.integer[Any]],
        open_shard: Callable[[int], Array],
        fetch: Callable[[Array, npt.NDArray[np.int64]], None] = lambda *_: None,
    ) -> Floats:
        """Scalars of tokens, float32 [len(index), N], from the shards that hold them."""
        index = np.asarray(index, np.int64)
        half = np.empty((len(index), len(self.scale_N)), np.float16)
        order = np.argsort(index, kind="stable")  # neighbours are read together
        bounds = np.searchsorted(index[order], self.starts)
        held = np.flatnonzero(bounds[1:] > bounds[:-1]).tolist()
        for block in (held[i : i + OPEN_SHARDS] for i in range(0, len(held), OPEN_SHARDS)):
            places = [order[bounds[number] : bounds[number + 1]] for number in block]
            rows = [index[part] - self.starts[number] for part, number in zip(places, block, strict=True)]
            shards = [open_shard(number) for number in block]
            for shard_TN, part in zip(shards, rows, strict=True):
                fetch(shard_TN, part)
            for place, shard_TN, part in zip(places, shards, rows, strict=True):
                half[place] = shard_TN[part]
        return self.decode(half)

    def expect(self, index: npt.NDArray[np.int64]) -> None:
        """Have the system begin to read ids, segments and sinks of tokens (in rising order)."""
        for array in self.side.values():
            fetch_rows(array, index)

    def trace(self, number: int) -> tuple[slice, Floats]:
        """The tokens of a trace as a slice into the corpus, and its scalars [T_trace, N]."""
        first, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        shard = int(np.searchsorted(self.starts, first, side="right")) - 1  # a trace never spans two shards
        start = int(self.starts[shard])
        return slice(first, stop), self.decode(self.shard(shard)[first - start : stop - start])

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            RunFailed: names the first damaged file.
        """
        for name, entry in self.index["files"].items():
            if hash_file(self.folder / name) != entry["sha256"]:
                raise RunFailed(f"{self.folder / name} is damaged (checksum); record this corpus again.")
