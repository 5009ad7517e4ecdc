"""Writing a scalar store, so that a run cut off anywhere continues and ends with the same bytes.

Everything that decides the bytes is fixed first and saved (`plan.json`), then the scale of each direction
(`calibration.json`); shards follow, each written to a temporary file, synced and renamed; the index is last.
Shape legend: T tokens, N directions.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import RunFailed
from lorascope.store import (
    CALIBRATION,
    DTYPES,
    FORMAT,
    INDEX,
    PLAN,
    TOKENS,
    Array,
    Floats,
    Store,
    hash_file,
    map_tensors,
    read_header,
    read_json,
    shard_name,
)
from lorascope.study import put_folder

HALF_MAX = 65504.0
HEADROOM_BITS = 6
"""The first batch's largest |scalar| becomes 32 to 64 in half precision: 1,000 times larger ones still fit,
and values down to a millionth of it keep full relative precision (2^-11)."""
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StorePlan:
    """What a recording will write, fixed before it begins. All sequences over traces are in store order."""

    addresses: list[str]
    effect_per_scalar: list[float]
    trace_ids: list[str]
    lengths: list[int]
    response_starts: list[int]
    shards: list[list[list[int]]]
    """Per shard its batches, per batch the traces in it; shards hold consecutive traces."""
    about: dict[str, Any]
    """Source, settings, sink rule, fingerprint of tokens and weights; another plan starts a new store."""


@dataclass
class Shard:
    """A shard being filled in memory."""

    number: int
    first: int
    """Store index of its first trace."""
    offsets: npt.NDArray[np.int64]
    z_TN: npt.NDArray[np.float16]
    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.uint8]
    sink: npt.NDArray[np.bool_]
    clipped_N: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """A tensor given in parts along its first axis, so that it need not fit in memory."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Array]]


def plan_shards(lengths: list[int], shard_tokens: int) -> list[tuple[int, int]]:
    """Ranges [first, stop) of consecutive traces of at most `shard_tokens` tokens (or a single trace)."""
    ranges: list[tuple[int, int]] = []
    first = total = 0
    for i, length in enumerate(lengths):
        if i > first and total + length > shard_tokens:
            ranges.append((first, i))
            first, total = i, 0
        total += length
    return [*ranges, (first, len(lengths))] if lengths else []


def to_bytes(array: Array) -> bytes:
    """Little-endian bytes in row order."""
    return np.ascontiguousarray(array).tobytes()


def whole(array: Array) -> Parts:
    """A tensor that is in memory, flags as bytes."""
    array = array.view(np.uint8) if array.dtype == np.bool_ else array
    return Parts(array.dtype, array.shape, lambda: [array])


def read_parts(paths: list[Path], key: str) -> Iterator[Array]:
    """One tensor of each file in turn."""
    for path in paths:
        yield map_tensors(path)[key]


def replace_file(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file whole or not at all: temporary file, sync, rename, sync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: dict[str, Parts]) -> None:
    """Write a safetensors file atomically, its data's SHA-256 in the header; equal input, equal bytes.

    The safetensors library would hold the whole file in memory.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    digest = hashlib.sha256()
    for _, tensor in ordered:
        for part in tensor.read():
            digest.update(to_bytes(part))
    header: dict[str, Any] = {"__metadata__": {"sha256": digest.hexdigest()}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        spec = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = spec
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def blocks() -> Iterable[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            for part in tensor.read():
                yield to_bytes(part)

    replace_file(path, blocks())


def is_whole(path: Path) -> bool:
    """Whether a tensor file is complete and its data has the checksum in its header."""
    try:
        header, start = read_header(path)
    except RunFailed:
        return False
    return bool(header["__metadata__"]["sha256"] == hash_file(path, start))


def write_json_file(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically; equal input, equal bytes."""
    replace_file(path, [(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()])


def part_folder(folder: Path) -> Path:
    """Where a recording goes as long as its folder holds a finished store of another plan."""
    return folder.with_name(f".{folder.name}.part")


def saved_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none that can be read."""
    try:
        return read_json(path)
    except RunFailed:
        return None


def recording_place(folder: Path, plan: dict[str, Any]) -> Path:
    """The folder to fill: the part folder, where this plan was begun there or another one is finished; else its own."""
    part = part_folder(folder)
    other = (folder / INDEX).is_file() and saved_json(folder / PLAN) != plan
    return part if other or saved_json(part / PLAN) == plan else folder


class StoreWriter:
    """Begins or continues the recording of `plan` for `folder`.

    A finished store of another plan is readable until `finish`: the new one grows in the hidden `part_folder` beside it
    and then takes its place. What was begun with another plan is removed first.
    """

    def __init__(self, folder: Path, plan: StorePlan) -> None:
        self.folder, self.plan = folder, plan
        wanted = json.loads(json.dumps(asdict(plan)))
        self.place = recording_place(folder, wanted)
        self.place.mkdir(parents=True, exist_ok=True)
        if saved_json(self.place / PLAN) != wanted:
            self._clear("*")
            write_json_file(self.place / PLAN, wanted)
        saved = saved_json(self.place / CALIBRATION)
        if saved is None:  # shards cannot be read without their scale
            self._clear("shard-*")
        self.scale_N = None if saved is None else np.array(saved["scale"], np.float32)

    def _clear(self, pattern: str) -> None:
        # the index first: a store without one is unfinished, whatever else is left
        for path in sorted(self.place.glob(pattern), key=lambda p: p.name != INDEX):
            if path.is_file():
                path.unlink()

    def missing(self) -> list[int]:
        """Numbers of the shards still to be written: absent or damaged."""
        numbers = range(len(self.plan.shards))
        return [i for i in numbers if not is_whole(self.place / shard_name(i))]

    def calibrate(self, largest_N: Floats) -> None:
        """Fix the scale of each direction from the largest |scalar| of the first batch; saved once."""
        exponent = np.ceil(np.log2(np.where(largest_N > 0, largest_N, 1.0))) - HEADROOM_BITS
        exponent = np.clip(exponent, -100, 15)  # what the reader multiplies by stays a normal float32
        scale = np.where(largest_N > 0, np.exp2(exponent), 1.0)
        write_json_file(self.place / CALIBRATION, {"scale": scale.tolist()})
        self.scale_N = scale.astype(np.float32)

    def begin(self, number: int) -> Shard:
        """An empty shard in memory."""
        traces = sorted(i for batch in self.plan.shards[number] for i in batch)
        offsets = np.cumsum([0] + [self.plan.lengths[i] for i in traces], dtype=np.int64)
        total, columns = int(offsets[-1]), len(self.plan.addresses)
        return Shard(
            number,
            traces[0],
            offsets,
            np.zeros((total, columns), np.float16),
            np.zeros(total, np.int32),
            np.zeros(total, np.uint8),
            np.zeros(total, np.bool_),
            np.zeros(columns, np.int64),
        )

    def put(self, shard: Shard, trace: int, z_TN: Floats, tokens: Array, segments: Array, sink: Array) -> None:
        """Put one trace into its shard; `calibrate` comes first.

        Values beyond half precision after scaling are cut to its largest number and counted (`clipped`).

        Raises:
            RunFailed: a scalar is not finite.
        """
        assert self.scale_N is not None, "calibrate comes before put"
        finite_N = np.isfinite(z_TN).all(axis=0)
        if not finite_N.all():
            address = self.plan.addresses[int(np.argmin(finite_N))]
            name = self.plan.trace_ids[trace]
            raise RunFailed(f"The scalar of {address} is not finite in trace {name}; record with --dtype float32.")
        scaled_TN = z_TN / self.scale_N
        over_TN = np.abs(scaled_TN) > HALF_MAX
        if over_TN.any():
            shard.clipped_N += over_TN.sum(axis=0)
            scaled_TN = np.clip(scaled_TN, -HALF_MAX, HALF_MAX)
        where = slice(*(int(x) for x in shard.offsets[trace - shard.first : trace - shard.first + 2]))
        shard.z_TN[where] = scaled_TN
        shard.tokens[where], shard.segments[where], shard.sink[where] = tokens, segments, sink

    def commit(self, shard: Shard) -> None:
        """Write a filled shard to its file, whole or not at all."""
        tensors = {
            "z": whole(shard.z_TN),
            "tokens": whole(shard.tokens),
            "segments": whole(shard.segments),
            "sink": whole(shard.sink),
            "clipped": whole(shard.clipped_N),
        }
        write_tensors(self.place / shard_name(shard.number), tensors)

    def finish(self) -> dict[str, Any]:
        """Write the corpus-wide arrays and the index once all shards are there, in the place of an older store.

        Returns the counts: traces, tokens, ordinary, sinks, sinks_by_position (positions 0 to 19 and "later"), clipped
        scalars, bytes.
        """
        plan, folder = self.plan, self.place
        names = [shard_name(i) for i in range(len(plan.shards))]
        total = sum(plan.lengths)
        side = {
            key: Parts(DTYPES[kind], (total,), partial(read_parts, [folder / name for name in names], key))
            for key, kind in (("tokens", "I32"), ("segments", "U8"), ("sink", "U8"))
        }
        write_tensors(folder / TOKENS, side)
        clipped = sum(int(map_tensors(folder / name)["clipped"].sum()) for name in names)
        written = map_tensors(folder / TOKENS)
        sinks = np.flatnonzero(written["sink"])
        offsets = np.cumsum([0, *plan.lengths])
        positions = sinks - offsets[np.searchsorted(offsets, sinks, side="right") - 1]
        counts_by = np.bincount(np.minimum(positions, 20), minlength=21)
        by_position = {("later" if i == 20 else str(i)): int(n) for i, n in enumerate(counts_by) if n}
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
            for name in (PLAN, CALIBRATION, TOKENS, *names)
        }
        counts = {
            "traces": len(plan.lengths),
            "tokens": total,
            "ordinary": int(np.sum((written["segments"] != 0) & (written["sink"] == 0))),
            "sinks": len(sinks),
            "sinks_by_position": by_position,
            "clipped": clipped,
            "bytes": sum((folder / name).stat().st_size for name in files),
        }
        index = {"format": FORMAT, "counts": counts, "about": plan.about, "files": files}
        made = Store.of(folder, {})
        index |= {"ordinary_by_segment": made.ordinary_by_segment, "medians": made.medians.tolist()}
        write_json_file(folder / INDEX, index)
        if folder != self.folder:
            put_folder(folder, self.folder)
            self.place = self.folder
        shutil.rmtree(part_folder(self.folder), ignore_errors=True)  # begun with another plan and given up
        return counts
