"""The scalar store: what goes in comes out, a cut-off run ends with the same bytes, damage is found and named."""

import json
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from lorascope import store_writer
from lorascope.errors import MissingStage, RunFailed
from lorascope.store import CALIBRATION, OPEN_SHARDS, Store, page_runs, shard_name
from lorascope.store_writer import StorePlan, StoreWriter, plan_shards

LENGTHS = [3, 5, 1, 4, 2, 6, 3]
ADDRESSES = ["L0.q", "L0.gate", "L1.down"]


def example_plan(lengths: list[int] = LENGTHS, shard_tokens: int = 8, **about: Any) -> StorePlan:
    ranges = plan_shards(lengths, shard_tokens)
    shards = [[list(range(first, stop))] for first, stop in ranges]
    return StorePlan(
        addresses=ADDRESSES,
        effect_per_scalar=[0.5, 2.0, 1.0],
        trace_ids=[f"t{i}" for i in range(len(lengths))],
        lengths=lengths,
        response_starts=[1] * len(lengths),
        shards=shards,
        about={"source": "adapter"} | about,
    )


def example_data(lengths: list[int] = LENGTHS, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    return {
        "z": (rng.standard_normal((total, 3)) * [1e-3, 1.0, 3e4]).astype(np.float32),
        "tokens": rng.integers(0, 100, total).astype(np.int32),
        "segments": rng.integers(0, 4, total).astype(np.uint8),
        "sink": rng.random(total) < 0.2,
        "offsets": np.cumsum([0, *lengths]),
    }


def record_all(folder: Path, data: dict[str, Any], plan: StorePlan | None = None) -> dict[str, Any]:
    """What the recording stage does, with known scalars."""
    writer = StoreWriter(folder, plan or example_plan())
    for number in writer.missing():
        shard = writer.begin(number)
        for batch in writer.plan.shards[number]:
            parts = {i: slice(data["offsets"][i], data["offsets"][i + 1]) for i in batch}
            if writer.scale_N is None:
                writer.calibrate(np.abs(np.concatenate([data["z"][p] for p in parts.values()])).max(axis=0))
            for i, p in parts.items():
                writer.put(shard, i, *(data[key][p] for key in ("z", "tokens", "segments", "sink")))
        writer.commit(shard)
    return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".tmp")}


def test_shards_hold_consecutive_traces_within_the_limit() -> None:
    assert plan_shards([3, 5, 1, 4, 2, 6, 3], 8) == [(0, 2), (2, 5), (5, 6), (6, 7)]
    assert plan_shards([20, 1], 8) == [(0, 1), (1, 2)]  # a trace longer than a shard has one of its own
    assert plan_shards([], 8) == []


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    data = example_data()
    counts = record_all(tmp_path / "s", data)
    store = Store.open(tmp_path / "s")
    assert (store.n_tokens, store.n_traces, len(store.starts) - 1) == (24, 7, 4)
    assert store.addresses == ADDRESSES
    assert store.trace_ids == [f"t{i}" for i in range(7)]
    np.testing.assert_array_equal(store.effect_per_scalar, np.float32([0.5, 2.0, 1.0]))
    np.testing.assert_array_equal(store.offsets, data["offsets"])
    np.testing.assert_array_equal(store.response_start, [1] * 7)
    for key in ("tokens", "segments", "sink"):
        np.testing.assert_array_equal(getattr(store, key), data[key])
    np.testing.assert_array_equal(store.ordinary, (data["segments"] != 0) & ~data["sink"])
    chunks = list(store.chunks(rows=4))
    assert [start for start, _ in chunks] == [0, 4, 8, 12, 15, 19, 21]
    z = np.concatenate([z for _, z in chunks])
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, data["z"], rtol=2**-11)  # half precision keeps 11 bits
    np.testing.assert_array_equal(np.concatenate([z for _, z in store.chunks()]), z)
    index = np.array([23, 0, 7, 8, 7, 15])
    np.testing.assert_array_equal(store.rows(index), z[index])
    np.testing.assert_array_equal(store.visit(index), z[index])
    for i in range(7):
        where, part = store.trace(i)
        assert (where.start, where.stop) == (data["offsets"][i], data["offsets"][i + 1])
        np.testing.assert_array_equal(part, z[where])
    np.testing.assert_array_equal(store.token_traces(np.array([0, 2, 3, 23])), [0, 0, 1, 6])
    assert counts["tokens"] == 24
    assert counts["sinks"] == data["sink"].sum() == sum(counts["sinks_by_position"].values())
    assert counts["ordinary"] == store.ordinary.sum()
    assert counts["clipped"] == 0
    store.verify()


def test_few_shards_are_open_at_once(tmp_path: Path) -> None:
    """Each map is an open file, and a corpus may have thousands of shards."""
    lengths, process = [2] * 50, psutil.Process()
    record_all(tmp_path / "s", example_data(lengths), example_plan(lengths, 2))
    before = process.num_fds()
    store = Store.open(tmp_path / "s")
    assert process.num_fds() == before
    wanted = np.concatenate([z for _, z in store.chunks()])
    np.testing.assert_array_equal(store.visit(np.arange(100)), wanted)
    assert process.num_fds() == before
    index = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(store.rows(index), wanted[index])
    np.testing.assert_array_equal(np.concatenate([store.trace(i)[1] for i in range(50)]), wanted)
    assert process.num_fds() == before + OPEN_SHARDS
    del store
    assert process.num_fds() == before


def test_the_safetensors_library_reads_a_shard(tmp_path: Path) -> None:
    record_all(tmp_path / "s", example_data())
    z = load_file(tmp_path / "s" / shard_name(0))["z"]
    np.testing.assert_array_equal(z, Store.open(tmp_path / "s").shard(0))


def test_assistant_means_are_over_response_tokens_and_need_no_list_of_them(tmp_path: Path) -> None:
    """Traces with a prompt alone, or none, among them; what is held does not grow with the corpus."""
    lengths, rng = [3, 5, 1, 4, 2, 6, 3] * 700, np.random.default_rng(0)
    starts = [int(rng.integers(0, length + 1)) for length in lengths]
    plan = replace(example_plan(lengths, 4000), response_starts=starts)
    record_all(tmp_path / "s", example_data(lengths), plan)
    store = Store.open(tmp_path / "s")
    parts = [store.trace(i)[1][start:] for i, start in enumerate(starts)]
    wanted = np.concatenate(parts).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(store.assistant_mean(), wanted, rtol=1e-6)
    flags = np.concatenate([np.arange(length) >= start for length, start in zip(lengths, starts, strict=True)])
    np.testing.assert_array_equal(store.assistant(0, store.n_tokens), flags)
    np.testing.assert_array_equal(store.assistant(1000, 1010), flags[1000:1010])


def test_assistant_means_hold_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.store.CHUNK_SCALARS", 3 * 100)
    record_all(tmp_path / "s", example_data([1000] * 60), example_plan([1000] * 60, 5000))
    store = Store.open(tmp_path / "s")
    store.assistant_mean()
    tracemalloc.start()
    store.assistant_mean()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < store.n_tokens  # not a byte per token


def test_small_and_large_scalars_keep_their_precision(tmp_path: Path) -> None:
    z = np.float32([[1.0, 0.0, 5e7], [2e-6, 0.0, -70.0], [900.0, 0.0, 1e9]])
    data = example_data([1, 1, 1]) | {"z": z}
    counts = record_all(tmp_path / "s", data, example_plan([1, 1, 1], 1))
    stored = np.concatenate([z for _, z in Store.open(tmp_path / "s").chunks()])
    np.testing.assert_allclose(stored, z, rtol=2**-10)
    assert counts["clipped"] == 0


def test_every_half_precision_number_is_decoded(tmp_path: Path) -> None:
    record_all(tmp_path / "s", example_data())
    store = Store.open(tmp_path / "s")
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)][:, None].repeat(3, axis=1)
    np.testing.assert_array_equal(store.decode(half), half.astype(np.float32) * store.scale_N)


def test_overflow_is_cut_and_counted(tmp_path: Path) -> None:
    z = np.float32([[1.0, 1.0, 1.0], [1e9, -1e9, 1.0]])
    data = example_data([1, 1]) | {"z": z}
    assert record_all(tmp_path / "s", data, example_plan([1, 1], 1))["clipped"] == 2
    store = Store.open(tmp_path / "s")
    np.testing.assert_array_equal(np.sign(store.rows(np.array([1]))), [[1, -1, 1]])
    assert np.isfinite(store.rows(np.array([1]))).all()


def test_a_scalar_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    data = example_data()
    data["z"][9, 1] = np.nan
    with pytest.raises(RunFailed, match=r"L0\.gate is not finite in trace t3"):
        record_all(tmp_path / "s", data)


def test_a_run_cut_off_anywhere_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example_data()
    record_all(tmp_path / "whole", data)
    wanted = contents(tmp_path / "whole")
    real, steps = store_writer.replace_file, 0

    def cut_after(limit: int, half_written: bool) -> Any:
        done = 0

        def replace_file(path: Path, blocks: Any) -> None:
            nonlocal done
            if done == limit:
                if half_written:  # killed inside a write: a part of the temporary file is left
                    path.with_name(path.name + ".tmp").write_bytes(b"".join(blocks)[:-3])
                raise KeyboardInterrupt
            done += 1
            real(path, blocks)

        return replace_file

    while True:
        for half_written in (False, True):
            folder = tmp_path / f"{steps}-{half_written}"
            monkeypatch.setattr(store_writer, "replace_file", cut_after(steps, half_written))
            try:
                record_all(folder, data)
            except KeyboardInterrupt:
                with pytest.raises(MissingStage, match="lorascope record"):
                    Store.open(folder)
            monkeypatch.setattr(store_writer, "replace_file", real)
            record_all(folder, data)
            assert contents(folder) == wanted
        steps += 1
        if steps > len(wanted):
            break
    assert steps == len(wanted) + 1  # plan, calibration, four shards, tokens, index: each was a place to be cut


def test_only_missing_and_damaged_shards_are_made_again(tmp_path: Path) -> None:
    data = example_data()
    record_all(tmp_path / "s", data)
    wanted = contents(tmp_path / "s")
    (tmp_path / "s" / shard_name(1)).unlink()
    damaged = bytearray(wanted[shard_name(2)])
    damaged[-1] ^= 1
    (tmp_path / "s" / shard_name(2)).write_bytes(damaged)
    assert StoreWriter(tmp_path / "s", example_plan()).missing() == [1, 2]
    record_all(tmp_path / "s", data)
    assert contents(tmp_path / "s") == wanted


def test_another_plan_grows_beside_the_finished_store_and_takes_its_place(tmp_path: Path) -> None:
    data, folder = example_data(), tmp_path / "s"
    record_all(folder, data)
    (folder / "beside.json").write_text("{}")
    old = contents(folder)
    assert StoreWriter(folder, example_plan(sink="other")).missing() == [0, 1, 2, 3]
    assert contents(folder) == old
    Store.open(folder).verify()
    record_all(folder, data, example_plan(sink="other"))
    record_all(tmp_path / "fresh", data, example_plan(sink="other"))
    assert contents(folder) == contents(tmp_path / "fresh")  # nor is anything of the old one left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "s"]


def test_another_recording_cut_off_anywhere_leaves_a_readable_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plan, real = example_data(), example_plan(sink="other"), store_writer.replace_file
    record_all(tmp_path / "new" / "s", data, plan)
    wanted = contents(tmp_path / "new" / "s")
    for limit in range(len(wanted)):
        folder = tmp_path / str(limit) / "s"
        record_all(folder, data)
        old, done = contents(folder), []

        def replace_file(path: Path, blocks: Any, limit: int = limit, done: list[int] = done) -> None:
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(1)
            real(path, blocks)

        monkeypatch.setattr(store_writer, "replace_file", replace_file)
        with pytest.raises(KeyboardInterrupt):
            record_all(folder, data, plan)
        assert contents(folder) == old
        monkeypatch.setattr(store_writer, "replace_file", real)
        written = min(max(limit - 2, 0), 4)  # after the plan and the scales
        assert len(StoreWriter(folder, plan).missing()) == 4 - written
        record_all(folder, data, plan)
        assert contents(folder) == wanted
        assert [p.name for p in folder.parent.iterdir()] == ["s"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_a_store_takes_anothers_place_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    data, plan, folder = example_data(), example_plan(sink="other"), tmp_path / "s"
    record_all(folder, data)

    def cut(new: Path, old: Path) -> None:
        if renames:
            old.rename(old.with_name(f".{old.name}.old"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "put_folder", cut)
        with pytest.raises(KeyboardInterrupt):
            record_all(folder, data, plan)
    assert StoreWriter(folder, plan).missing() == []
    record_all(folder, data, plan)
    assert Store.open(folder).index["about"]["sink"] == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_was_begun_beside_a_store_and_given_up_is_removed(tmp_path: Path) -> None:
    data, folder = example_data(), tmp_path / "s"
    record_all(folder, data)
    StoreWriter(folder, example_plan(sink="other"))
    assert StoreWriter(folder, example_plan(sink="third")).missing() == [0, 1, 2, 3]  # in place of the other
    assert json.loads((tmp_path / ".s.part" / "plan.json").read_text())["about"]["sink"] == "third"
    record_all(folder, data)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_was_begun_with_another_plan_is_made_anew(tmp_path: Path) -> None:
    data, folder = example_data(), tmp_path / "s"
    record_all(folder, data)
    (folder / "index.json").unlink()  # as a run leaves it that was cut off
    assert StoreWriter(folder, example_plan(sink="other")).missing() == [0, 1, 2, 3]
    with pytest.raises(MissingStage):
        Store.open(folder)
    assert not list(folder.glob("shard-*"))


def test_without_its_scales_a_store_is_made_again(tmp_path: Path) -> None:
    record_all(tmp_path / "s", example_data())
    (tmp_path / "s" / CALIBRATION).unlink()
    assert StoreWriter(tmp_path / "s", example_plan()).missing() == [0, 1, 2, 3]


def test_nothing_recorded_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingStage, match="--corpus train --source base"):
        Store.open(tmp_path / "study" / "scalars" / "train" / "base")


@pytest.mark.parametrize("name", ["plan.json", "calibration.json", "tokens.safetensors", shard_name(3)])
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    record_all(tmp_path / "s", example_data())
    path = tmp_path / "s" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the size stays
    path.write_bytes(content)
    with pytest.raises(RunFailed, match=name):
        Store.open(tmp_path / "s").verify()
    path.write_bytes(content[:-5])
    with pytest.raises(RunFailed, match=name):
        Store.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(RunFailed, match=name):
        Store.open(tmp_path / "s")


def test_damaged_index_and_headers_are_found(tmp_path: Path) -> None:
    record_all(tmp_path / "s", example_data())
    index = tmp_path / "s" / "index.json"
    whole = index.read_text()
    for broken in ("{", "[]", json.dumps(json.loads(whole) | {"format": 0})):
        index.write_text(broken)
        with pytest.raises(RunFailed):
            Store.open(tmp_path / "s")
    index.write_text(whole)
    shard = tmp_path / "s" / shard_name(0)
    content = bytearray(shard.read_bytes())
    content[0] ^= 64  # the length of the header
    shard.write_bytes(content)
    store = Store.open(tmp_path / "s")  # a shard is looked at when it is read
    for read in (lambda: store.trace(0), lambda: store.rows(np.array([1])), lambda: list(store.chunks()), store.verify):
        with pytest.raises(RunFailed, match=shard_name(0)):
            read()
    np.testing.assert_array_equal(store.trace(5)[1].shape, (6, 3))


def test_the_index_has_what_would_else_be_read_anew(tmp_path: Path) -> None:
    data = example_data()
    record_all(tmp_path / "store", data)
    store = Store.open(tmp_path / "store")
    assert {"medians", "ordinary_by_segment"} <= set(store.index)
    earlier = Store.of(store.folder, {})
    ordinary = (data["segments"] != 0) & ~data["sink"]
    z = np.concatenate([z_TN for _, z_TN in store.chunks()])
    for one in (store, earlier):
        assert np.array_equal(one.medians, np.median(z[ordinary].astype(np.float64), axis=0))
        assert one.ordinary_by_segment == np.bincount(data["segments"][ordinary], minlength=4).tolist()


@pytest.mark.parametrize("width", [1, 10, 64, 150])
def test_pages_to_read_are_those_of_the_rows(width: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = 7 + width * np.sort(rng.integers(0, 5000 // width, 12))  # some of them twice
        runs = page_runs(starts, width, 64)
        held = {byte // 64 for start in starts.tolist() for byte in range(start, start + width)}
        assert [page for first, stop in runs for page in range(first // 64, stop // 64)] == sorted(held)
        assert all(stop < first for (_, stop), (first, _) in pairwise(runs)), "apart from each other"
