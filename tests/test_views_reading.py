"""What views read of a study: rows of one feature out of large files, the adapter without torch."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lorascope.adapter import Adapter
from lorascope.errors import BadInput, RunFailed
from lorascope.study import Study
from lorascope.views.directions import open_directions
from lorascope.views.reading import feature_lines, feature_rows, json_lines, table_rows
from tiny_models import random_adapter, tiny_model


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create(tmp_path / "study", model="tiny", system=None)


def test_lines_of_one_feature_are_those_of_the_whole_file(study: Study) -> None:
    rows = [
        {"feature": "sae.1", "text": 'says "feature": "sae.2"'},
        {"feature": 'odd"\\.+', "text": "quoted"},
        {"text": "the feature comes later", "feature": "sae.1"},
        {"feature": "sae.2", "text": "line\u2028separator\rand return"},
        {"text": "of no feature"},
    ]
    file = study.path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")
    assert list(json_lines(study, "rows.jsonl")) == rows
    for feature in ("sae.1", "sae.2", 'odd"\\.+', "sae.3"):
        wanted = [row for row in rows if row.get("feature") == feature]
        assert feature_lines(study, "rows.jsonl", feature) == wanted
    with file.open("a") as lines:
        lines.write('{"feature": "sae.1", "text": "whole"}')
    assert len(feature_lines(study, "rows.jsonl", "sae.1")) == 3, "a last line may lack its end"
    file.write_text('{"feature": "sae.1"}\n{"feature": "sae.1", "text": "cut o')
    assert feature_lines(study, "rows.jsonl", "sae.1") == [{"feature": "sae.1"}]
    file.write_text('{"feature": "sae.1", oops}\n{"feature": "sae.2"}\n')
    assert feature_lines(study, "rows.jsonl", "sae.2") == [{"feature": "sae.2"}]
    with pytest.raises(RunFailed, match="damaged"):
        feature_lines(study, "rows.jsonl", "sae.1")
    assert feature_lines(study, "none.jsonl", "sae.1") == []


@pytest.mark.parametrize("features", [["a", "a", "b", "c", "c"], ["b", "a", "c", "a", "b"]])
def test_rows_of_one_feature_wherever_they_stand(study: Study, features: list[str]) -> None:
    table = pa.table({"feature": features, "where": ["top", "q0", "top", "q1", "top"], "rank": list(range(5))})
    pq.write_table(table, study.path / "rows.parquet", row_group_size=2)
    rows = table.to_pylist()
    assert table_rows(study, "rows.parquet") == rows, "the table keeps the order of its file"
    for name in "abcd":
        assert feature_rows(study, "rows.parquet", name) == [row for row in rows if row["feature"] == name]


@pytest.mark.parametrize("rank", [1, 2])
def test_directions_are_those_of_the_adapter(study: Study, rank: int) -> None:
    assert open_directions(study) is None
    random_adapter(tiny_model(), rank=rank).save(study.path / "adapter")
    adapter, found = Adapter.load(study.path / "adapter"), open_directions(study)
    assert found is not None
    assert found.addresses == adapter.addresses
    assert found.rank == rank
    np.testing.assert_allclose(found.effect_per_scalar, adapter.effect_per_scalar, rtol=1e-6)
    for (place, a_RI, b_OR, scale), module in zip(found.factors(), adapter.modules, strict=True):
        assert (place.path, place.layer, place.type) == (module.path, module.layer, module.type)
        assert (place.columns, scale) == (module.columns, module.scale)
        assert np.array_equal(a_RI, module.a_RI.numpy())
        assert np.array_equal(b_OR, module.b_OR.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_an_adapter_of_another_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = random_adapter(tiny_model())
    adapter.save(tmp_path)
    tensors = {
        f"base_model.model.{module.path}.lora_{half}.weight": tensor.to(dtype)
        for module in adapter.modules
        for half, tensor in (("A", module.a_RI), ("B", module.b_OR))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if dtype == torch.float8_e4m3fn:
        with pytest.raises(BadInput, match="F8_E4M3"):
            Adapter.load(tmp_path)
        return
    for module, before in zip(Adapter.load(tmp_path).modules, adapter.modules, strict=True):
        assert torch.equal(module.a_RI, before.a_RI.to(dtype).float())
        assert torch.equal(module.b_OR, before.b_OR.to(dtype).float())
