"""PEFT folders in and out, addresses, patterns; what cannot be directions is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorascope import adapter as adapter_module
from lorascope.adapter import Adapter, initial_adapter
from lorascope.addresses import direction_layer, direction_type, locate_modules, parse_layers, select
from lorascope.attached import attach
from lorascope.errors import BadInput
from tiny_models import random_adapter, tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 1, "lora_alpha": 16, "target_modules": ALL},
    "rank 4, rsLoRA": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL},
    "patterns": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.gate_proj": 1},
        "alpha_pattern": {"up_proj": 32, "layers.0.self_attn.k_proj": 4},
    },
    "some layers": {"r": 1, "lora_alpha": 16, "target_modules": ["down_proj"], "layers_to_transform": [0, 2]},
    "all-linear": {"r": 1, "lora_alpha": 16, "target_modules": "all-linear"},
    "a regex": {"r": 1, "lora_alpha": 16, "target_modules": r".*layers\.[01]\.mlp\.(gate|up)_proj"},
}


def peft_folder(folder: Path, config: dict[str, Any], kind: str = "qwen2") -> torch.Tensor:
    """Save a random PEFT adapter of this config; returns its model's logits."""
    model = get_peft_model(tiny_model(kind), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder)
        return model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_any_peft_lora_is_read_and_written_back_to_the_same_model(tmp_path: Path, name: str) -> None:
    logits = peft_folder(tmp_path / "theirs", CONFIGS[name])
    adapter = Adapter.load(tmp_path / "theirs")
    model = tiny_model("qwen2")
    with torch.no_grad(), attach(model, adapter) as attached:
        ours = attached.run(torch.tensor([[3, 1, 4, 1, 5]])).logits
    assert (ours - logits).abs().max() <= 1e-4 * max(1, logits.abs().max())
    adapter.save(tmp_path / "ours")
    back = PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        again = back(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits
    assert (again - logits).abs().max() <= 1e-4 * max(1, logits.abs().max())
    theirs, mine = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert set(theirs) == set(mine)


def test_columns_go_by_layer_then_type_then_rank() -> None:
    adapter = random_adapter(tiny_model(), rank=2)
    expected = [f"L{i}.{t}#{r}" for i in range(3) for t in ("q", "k", "v", "o", "gate", "up", "down") for r in (0, 1)]
    assert adapter.addresses == expected
    starts = [m.columns.start for m in adapter.modules]
    assert starts == list(range(0, 42, 2))
    assert random_adapter(tiny_model()).addresses[:2] == ["L0.q", "L0.k"]


def test_unknown_modules_keep_their_names_and_clashes_keep_their_path() -> None:
    paths = ["m.layers.1.attn.qkv_proj", "m.layers.1.moe.0.down_proj", "m.layers.1.moe.1.down_proj", "score"]
    located = locate_modules(paths)
    assert located["m.layers.1.attn.qkv_proj"] == (1, "qkv_proj")
    assert located["score"] == (None, "score")
    assert len(set(located.values())) == 4


def test_patterns_select() -> None:
    addresses = random_adapter(tiny_model()).addresses

    def chosen(pattern: str) -> list[str]:
        return [a for a, hit in zip(addresses, select(addresses, pattern), strict=True) if hit]

    assert chosen("L1.gate") == ["L1.gate"]
    assert chosen("gate") == ["L0.gate", "L1.gate", "L2.gate"]
    assert chosen("L[01].attn") == [f"L{i}.{t}" for i in (0, 1) for t in "qkvo"]
    assert chosen("mlp,L0.q") == ["L0.q", *(f"L{i}.{t}" for i in range(3) for t in ("gate", "up", "down"))]
    assert len(chosen("*")) == 21
    with pytest.raises(BadInput, match="matches no direction"):
        select(addresses, "L7.*")
    assert (direction_layer("L12.gate#1"), direction_type("L12.gate#1")) == (12, "gate")


def test_effects_do_not_change_when_a_direction_is_split_otherwise() -> None:
    adapter = random_adapter(tiny_model())
    before = adapter.effect_per_scalar * adapter.read_norms
    for module in adapter.modules:
        module.a_RI.mul_(4)
        module.b_OR.div_(4)
    again = Adapter(adapter.modules, adapter.config)
    np.testing.assert_allclose(again.effect_per_scalar * again.read_norms, before, rtol=1e-5)
    np.testing.assert_allclose(again.effect_per_scalar, 16 * again.write_norms, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 3}, "rank 3"),
    ],
)
def test_what_directions_cannot_express_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    random_adapter(tiny_model()).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=words):
        Adapter.load(tmp_path)


def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"adapter_config\.json is missing"):
        Adapter.load(tmp_path)
    random_adapter(tiny_model()).save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != first}, weights)
    with pytest.raises(BadInput, match="incomplete"):
        Adapter.load(tmp_path)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(BadInput, match=r"lm_head\.weight"):
        Adapter.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged"):
        Adapter.load(tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="pickle"):
        Adapter.load(tmp_path)


def test_an_untrained_adapter_changes_nothing() -> None:
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        base = model(input_ids=ids).logits
        with attach(model, initial_adapter(model)) as attached:
            assert torch.equal(attached.run(ids).logits, base)


@pytest.mark.parametrize("fatal", ["weights", "config"])
def test_saving_over_an_adapter_never_leaves_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: str) -> None:
    """Cut off while either file is written: the old adapter, or one that says that it is incomplete."""
    folder = tmp_path / "adapter"
    random_adapter(tiny_model()).save(folder)
    (folder / "notes.txt").write_text("kept")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = save_file

    def write_half(tensors: Any, file: Path, **more: Any) -> None:
        real(tensors, file, **more)
        Path(file).write_bytes(Path(file).read_bytes()[:100])
        raise KeyboardInterrupt

    def die(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    target = (adapter_module, "save_file", write_half) if fatal == "weights" else (adapter_module.json, "dumps", die)
    with monkeypatch.context() as patch:
        patch.setattr(*target)
        with pytest.raises(KeyboardInterrupt):
            random_adapter(tiny_model(), rank=2, seed=9).save(folder)
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
    assert kept == before
    random_adapter(tiny_model(), rank=2).save(folder)
    assert Adapter.load(folder).modules[0].rank == 2
    assert sorted(p.name for p in folder.iterdir()) == [*sorted(before)]


def test_between_its_two_files_an_adapter_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_adapter(tiny_model()).save(tmp_path)
    real, moved = adapter_module.os.replace, []

    def replace_once(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_module.os, "replace", replace_once)
        with pytest.raises(KeyboardInterrupt):
            random_adapter(tiny_model(), rank=2).save(tmp_path)
    with pytest.raises(BadInput, match=r"adapter_config\.json is missing"):
        Adapter.load(tmp_path)


def test_layers_are_numbers_ranges_or_patterns() -> None:
    assert parse_layers("*", 30) == set(range(30))
    assert parse_layers("2[0-9]", 30) == set(range(20, 30))
    assert parse_layers("1?, 3", 30) == {3, *range(10, 20)}
    assert parse_layers("0-9:3,2[!1-9]", 30) == {0, 3, 6, 9, 20}
    for bad, words in (("3?", "no layer matches '3[?]'"), ("first", "not a layer choice"), ("30", "no layer 30")):
        with pytest.raises(BadInput, match=words):
            parse_layers(bad, 30)
