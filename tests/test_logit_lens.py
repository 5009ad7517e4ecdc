"""The lens equals brute force, sees planted vectors, and says when it does not know a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
)

from lorascope.adapter import Adapter
from lorascope.addresses import group_of
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.logit_lens import LensConfig, make_lens, read_lens, residual_vectors
from lorascope.residual_norms import find_norms
from lorascope.study import Study
from many_models import build_model
from planted_model import EVERY, TRIGGERS, planted_traces, save_planted
from tiny_models import SIZES, random_adapter, tiny_model
from tiny_store import make_study

KNOWN = 90
TEXTS = [f"t{i}" for i in range(KNOWN)]
CONFIG = LensConfig(top=5, random=50)


def uneven(model: Any) -> Any:
    """Give every norm a weight of its own: at 1 everywhere they could be left out unnoticed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.ndim == 1:
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    return model


def rows_of(table: pa.Table) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["feature"], row["side"]): row for row in table.to_pylist()}


def gamma(model: Any, path: str) -> Any:
    norm = model.get_submodule(path)
    return (norm.weight + (1.0 if "Gemma" in type(norm).__name__ else 0.0)).detach()


def check(row: dict[str, Any], values_V: Any) -> None:
    """A row holds the largest and smallest of these values, which are about their mean."""
    values_V = values_V[:KNOWN] - values_V[:KNOWN].mean()
    order = values_V.argsort(descending=True)
    assert row["ids"] == order[:5].tolist()
    assert row["tokens"] == [TEXTS[i] for i in row["ids"]]
    assert row["bottom_ids"] == order.flip(0)[:5].tolist()
    np.testing.assert_allclose(row["values"], values_V[order[:5]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(row["bottom_values"], values_V[order.flip(0)[:5]], rtol=1e-4, atol=1e-5)


def gemma() -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"initializer_range": 0.2, "head_dim": 8, "tie_word_embeddings": True}
    return Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied", "gemma2"])
def test_equals_brute_force(kind: str) -> None:
    changes = {"tie_word_embeddings": True} if kind == "tied" else {}
    model = uneven(gemma() if kind == "gemma2" else tiny_model("llama" if kind == "tied" else kind, **changes))
    adapter = random_adapter(model, rank=2 if kind == "llama" else 1)
    rng = np.random.default_rng(2)
    decoder = rng.normal(size=(7, len(adapter.addresses))).astype(np.float32)
    table, counts = make_lens(model, adapter, decoder, TEXTS, CONFIG, seed=0)
    rows = rows_of(table)
    head, embed = (m.weight.detach() for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    final = gamma(model, "model.norm")
    latents = torch.zeros(7, head.shape[1])
    for module, name in zip(adapter.modules, adapter.module_addresses, strict=True):
        block = "attention" if module.type in "qkvo" else "mlp"
        layer = f"model.layers.{module.layer}"
        before = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
        if kind == "gemma2":
            before = {"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"}
        for r in range(module.rank):
            address = name + (f"#{r}" if module.rank > 1 else "")
            if module.type in ("o", "down"):
                v = module.scale * module.b_OR[:, r]
                if kind == "gemma2":
                    after = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
                    v = v * gamma(model, f"{layer}.{after[block]}")
                latents += torch.outer(torch.from_numpy(decoder[:, module.columns.start + r]), v)
                values, side, length = head @ (final * v) / v.norm(), "write", v.norm()
            else:
                a = module.a_RI[r] * gamma(model, f"{layer}.{before[block]}")
                values = embed / embed.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-30) @ a / a.norm()
                side, length = "read", a.norm()
            check(rows[f"{address}+", side], values)
            check(rows[f"{address}-", side], -values)
            assert rows[f"{address}+", side]["norm"] == pytest.approx(float(length), rel=1e-5)
    for i, v in enumerate(latents):
        check(rows[f"sae.{i}", "write"], head @ (final * v) / v.norm())
    assert len(rows) == counts["features"] == 2 * len(adapter.addresses) + 7
    assert counts["directions_elsewhere"] == 0


def centred(vectors: Any) -> Any:
    return vectors - vectors.mean(dim=-1, keepdim=True)


PLACES: dict[str, tuple[str, tuple[str, str], tuple[str, str]]] = {
    "phi": ("model.final_layernorm", ("input_layernorm", "input_layernorm"), ("", "")),
    "gpt2": ("transformer.ln_f", ("ln_1", "ln_2"), ("", "")),
    "opt": ("model.decoder.final_layer_norm", ("self_attn_layer_norm", "final_layer_norm"), ("", "")),
    "olmo2": ("model.norm", ("", ""), ("post_attention_layernorm", "post_feedforward_layernorm")),
    "glm4": (
        "model.norm",
        ("input_layernorm", "post_attention_layernorm"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
}
"""The final norm, and in each layer the norms before and after attention and the MLP."""


@pytest.mark.parametrize("kind", list(PLACES))
def test_norms_are_found_wherever_they_are(kind: str) -> None:
    """LayerNorms, norms of two blocks at once, before, after and on both sides: against the formulas written out."""
    model = build_model(kind)
    adapter = random_adapter(model)
    rows = rows_of(make_lens(model, adapter, None, TEXTS, CONFIG, seed=0)[0])
    head, embed = (m.weight.detach()[:KNOWN] for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    final, before, after = PLACES[kind]
    take_mean = centred if kind in ("phi", "gpt2", "opt") else torch.nn.Identity()
    for module, name in zip(adapter.modules, adapter.module_addresses, strict=True):
        block = ("attn", "mlp").index(str(group_of(module.type)))
        layer = module.path[: module.path.index(f".{module.layer}.") + 2]
        norms = {side: f"{layer}.{names[block]}" for side, names in (("b", before), ("a", after)) if names[block]}
        if (name + "+", "write") in rows:
            v = module.scale * module.b_OR[:, 0]
            v = v * gamma(model, norms["a"]) if "a" in norms else v
            check(rows[f"{name}+", "write"], head @ (gamma(model, final) * take_mean(v / v.norm())))
        else:
            a = module.a_RI[0] * gamma(model, norms["b"]) if "b" in norms else module.a_RI[0]
            known = take_mean(embed)
            known = known / known.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-30) if "b" in norms else embed
            check(rows[f"{name}+", "read"], known @ a / take_mean(a).norm())


def test_reads_are_the_scalars_of_single_tokens() -> None:
    """On a text of one token, layer 0's attention sees its embedding alone: the recorded scalar is the read's value."""
    model = uneven(tiny_model())
    adapter = random_adapter(model)
    table, _ = make_lens(model, adapter, None, TEXTS, CONFIG, seed=0)
    row = rows_of(table)["L0.k+", "read"]
    with torch.no_grad(), attach(model, adapter) as attached:
        z_V = attached.run([[i] for i in range(KNOWN)]).scalars[:, 0, adapter.addresses.index("L0.k")].cpu()
    expected = (z_V - z_V.mean())[row["ids"]]
    np.testing.assert_allclose(np.array(row["values"]) * row["norm"], expected, rtol=1e-3, atol=1e-4)


def test_planted_vectors_get_their_token_first_and_beat_random_ones() -> None:
    model = uneven(tiny_model())
    adapter = random_adapter(model)
    head, final = model.get_output_embeddings().weight.detach(), gamma(model, "model.norm")
    embed = model.get_input_embeddings().weight.detach()
    before = gamma(model, "model.layers.2.post_attention_layernorm")
    modules = []
    for module, name in zip(adapter.modules, adapter.module_addresses, strict=True):
        if name == "L1.down":
            module = replace(module, b_OR=(head[42] * final)[:, None])
        if name == "L2.up":
            module = replace(module, a_RI=-(embed[17] / before)[None], scale=-module.scale)
        modules.append(module)
    planted = replace(adapter, modules=tuple(modules))
    rows = rows_of(make_lens(model, planted, None, TEXTS, CONFIG, seed=0)[0])
    assert rows["L1.down+", "write"]["ids"][0] == 42
    assert rows["L1.down-", "write"]["bottom_ids"][0] == 42
    assert rows["L2.up+", "read"]["ids"][0] == 17  # a negative scale turns the polarities round
    for name, side in (("L1.down+", "write"), ("L2.up+", "read")):
        assert rows[name, side]["random_share"] == pytest.approx(1 / 51)
    shares = [row["random_share"] for key, row in rows.items() if key[0][:-1] not in ("L1.down", "L2.up")]
    assert 0.3 < np.mean(shares) < 0.7  # the others are random themselves


def test_polarities_do_not_change_with_the_lengths_of_a_and_b() -> None:
    model = uneven(tiny_model())
    adapter = random_adapter(model)
    longer = replace(adapter, modules=tuple(replace(m, a_RI=m.a_RI * 3, b_OR=m.b_OR / 3) for m in adapter.modules))
    turned = replace(adapter, modules=tuple(replace(m, a_RI=-m.a_RI, b_OR=-m.b_OR) for m in adapter.modules))
    first, second, third = (
        rows_of(make_lens(model, one, None, TEXTS, CONFIG, seed=0)[0]) for one in (adapter, longer, turned)
    )
    for (name, side), row in first.items():
        assert second[name, side]["ids"] == row["ids"]
        assert third[name[:-1] + {"+": "-", "-": "+"}[name[-1]], side]["ids"] == row["ids"]


def test_a_model_without_a_final_norm_is_named() -> None:
    model = tiny_model()
    model.model.norm = torch.nn.Identity()
    with pytest.raises(BadInput, match="architecture LlamaForCausalLM: it needs a norm, as wide as"):
        make_lens(model, random_adapter(model), None, TEXTS, CONFIG, seed=0)


def test_a_norm_that_is_neither_kind_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].input_layernorm.forward = lambda x: torch.tanh(x)
    with pytest.raises(BadInput, match="RMS norms or LayerNorms"):
        make_lens(model, random_adapter(model), None, TEXTS, CONFIG, seed=0)


def test_an_sae_of_another_adapter_is_refused() -> None:
    model = tiny_model()
    decoder = np.ones((4, 2), np.float32)
    with pytest.raises(RunFailed, match="another adapter"):
        make_lens(model, random_adapter(model), decoder, TEXTS, CONFIG, seed=0)


def test_directions_elsewhere_are_counted() -> None:
    model = tiny_model()
    adapter = random_adapter(model, patterns="o")
    other = replace(adapter, modules=(replace(adapter.modules[0], type="self_attn.new"), *adapter.modules[1:]))
    _, counts = make_lens(model, other, None, TEXTS, CONFIG, seed=0)
    assert (counts["directions_elsewhere"], counts["features"]) == (2, 4)
    assert set(counts["sides"]) == {"write"}
    writes, reads = residual_vectors(find_norms(model, other), other, None)
    assert (writes.vectors_KD.shape, reads.ids) == ((4, 32), [])


def test_the_stage(tmp_path: Path) -> None:
    model_folder, adapter_folder = save_planted(tmp_path)
    traces = planted_traces(tmp_path / "traces.jsonl")
    create_study(
        tmp_path / "study", NewConfig(str(model_folder), str(traces), adapter=str(adapter_folder), system=""), Options()
    )
    study = Study.open(tmp_path / "study")
    everything = LensConfig(top=5000, random=20)
    result = read_lens(study, everything, Options())
    table = pq.read_table(study.path / "lens" / "lens.parquet")
    rows = rows_of(table)
    # the planted read vectors solve for their token among the words of the planted language
    for feature in ("L0.gate+", "L0.gate-", "L0.up+"):
        words = [token for token in rows[feature, "read"]["tokens"] if token in EVERY]
        assert words[0] == TRIGGERS[feature]
        assert len(words) == len(EVERY)
    assert result["features"] == len(rows) == 28
    assert read_lens(study, everything, Options()) == result
    assert "up to date" in (study.path / "log.txt").read_text().splitlines()[-1]
    directions = Adapter.load(study.path / "adapter").addresses
    (study.path / "sae").mkdir()
    decoder = np.ones((2, len(directions)), np.float32)
    save_file({"W_dec": decoder}, study.path / "sae" / "sae_weights.safetensors")
    assert read_lens(study, LensConfig(top=3, random=20), Options())["features"] == 30
    assert len(rows_of(pq.read_table(study.path / "lens" / "lens.parquet"))) == 30


def test_bad_input(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    with pytest.raises(BadInput, match="--top and --random"):
        read_lens(study, LensConfig(top=0), Options())
    with pytest.raises(MissingStage, match="lorascope train"):
        read_lens(study, LensConfig(), Options())
