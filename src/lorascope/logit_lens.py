"""The lens: top tokens of what directions and latents write to the residual stream, and of what directions read there.

A write v (of o or down, or a latent's through both) adds W_U·(γ ⊙ v) / r to the logits, where γ is the weight of the
final norm and r the length by which it divides, which is taken as constant: so tokens are ranked by W_U·(γ ⊙ v). A
read a (of q k v gate up) sees γ ⊙ h / rms(h) of the residual stream h, γ of its own layer's norm. On a token's
embedding e alone that is a·(γ ⊙ e) / rms(e): embeddings are normalised as the model's own norm does it, so that long
ones do not lead every list. So each side is one vector of the residual stream (v, or γ ⊙ a) against one table with a
row per token. Values are for that vector at length 1, about their mean over the vocabulary: a softmax does not see the
mean. All is linear and direct: what later layers make of a write is left out.

Shape legend: K vectors, D model width, V vocabulary, Q random vectors, F latents, J tokens listed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file
from torch import Tensor

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.progress import progress
from lorascope.study import Study, atomic_write_bytes
from lorascope.token_text import open_tokenizer, vocabulary_texts

if TYPE_CHECKING:
    from torch import nn

LENS = "lens/lens.parquet"
SAE_WEIGHTS = "sae/sae_weights.safetensors"
READS = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
WRITES = {"o": "attention", "down": "mlp"}
VECTORS = 64
"""Vectors whose values on the whole vocabulary exist at once."""
ROWS = 16_384
"""Rows of a table that are converted to fp32 at once."""


@dataclass(frozen=True)
class LensConfig:
    """Top tokens of what directions and latents write and read, straight through the unembedding and the embedding."""

    top: int = 20
    """Tokens listed at either end."""
    random: int = 200
    """Random vectors whose largest values make the null."""


@dataclass(frozen=True)
class TokenTable:
    """Rows to compare a vector of the residual stream with: value = row·(fold ⊙ vector) · scale, minus the mean."""

    weight_VD: Tensor
    """In the model's dtype, on its device."""
    fold_D: Tensor
    scale_V: Tensor

    def values(self, vectors_KD: Tensor) -> Tensor:
        """Values of all tokens about their mean over the vocabulary, fp32 [K, V], on the CPU."""
        folded_KD = vectors_KD.to(self.weight_VD.device) * self.fold_D
        parts = [folded_KD @ rows_VD.float().T for rows_VD in self.weight_VD.split(ROWS)]
        values_KV = torch.cat(parts, dim=1) * self.scale_V
        return (values_KV - values_KV.mean(dim=1, keepdim=True)).cpu()


@dataclass(frozen=True)
class Norms:
    """Weights of a layer's norms before each block, which reads see, and after it (ones without such a norm), [D]."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass(frozen=True)
class Vectors:
    """Vectors of the residual stream on one side, and the features they belong to."""

    ids: list[str]
    vectors_KD: Tensor
    """fp32, at their own length."""


def read_lens(study: Study, config: LensConfig, options: Options) -> dict[str, Any]:
    """Write `lens/lens.parquet`: per feature and side (`write`, `read`) the tokens at both ends.

    Columns: feature, side, norm (length of the vector per unit of scalar, or of code), tokens, ids, values (largest
    first), bottom_tokens, bottom_ids, bottom_values (smallest first), random_share (how often the largest value of a
    random vector of the same length is as large: (1 + those) / (1 + all)).

    Returns:
        `{"features", "directions_elsewhere", "sides": {side: {"features", "beyond_random", "random_largest"}}}`:
        `directions_elsewhere` counts polarities that neither read nor write the residual stream alone,
        `beyond_random` those with a random_share of at most 0.05, `random_largest` is the median random vector's.

    Raises:
        BadInput: the model's parts are not where this expects them, or a number makes no sense.
        MissingStage: there is no adapter.
    """
    if config.top < 1 or config.random < 1:
        raise BadInput("--top and --random must be at least 1.")
    study.require("adapter/adapter_config.json", "lorascope train STUDY")
    study.require("tokenizer/tokenizer.json", "lorascope record STUDY")
    latents = [SAE_WEIGHTS] if (study.path / SAE_WEIGHTS).is_file() else []

    def work() -> dict[str, Any]:
        from lorascope.models import load_model

        model, _ = load_model(study.model_name, device=options.device, dtype=options.dtype)
        adapter = Adapter.load(study.path / "adapter")
        decoder_FN = load_file(study.path / SAE_WEIGHTS)["W_dec"] if latents else None
        texts = vocabulary_texts(open_tokenizer(study.path / "tokenizer"))
        table, counts = make_lens(model, adapter, decoder_FN, texts, config, options.seed)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        atomic_write_bytes(study.path / LENS, sink.getvalue().to_pybytes())
        return counts

    inputs = ["adapter", "tokenizer/tokenizer.json", *latents]
    return study.run("lens", config, options, inputs=inputs, outputs=[LENS], work=work)


@torch.inference_mode()
def make_lens(
    model: Any,
    adapter: Adapter,
    decoder_FN: npt.NDArray[np.floating] | None,
    texts: Sequence[str],
    config: LensConfig,
    seed: int,
) -> tuple[pa.Table, dict[str, Any]]:
    """The table of `read_lens` and its counts.

    Args:
        decoder_FN: the SAE's decoder for raw scalars; None without latents.
        texts: readable text of each vocabulary id; rows of the model's tables beyond them are padding.

    Raises:
        BadInput: the model's parts are not where this expects them.
    """
    writes, reads = residual_vectors(model, adapter, decoder_FN)
    known = min(len(texts), model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    tables: list[pa.Table] = []
    sides: dict[str, Any] = {}
    for side, vectors in (("write", writes), ("read", reads)):
        if not vectors.ids:
            continue
        against = unembedding(model, adapter, known) if side == "write" else embedding(model, known)
        random_QD = torch.randn(config.random, vectors.vectors_KD.shape[1], generator=generator)
        null_Q = torch.cat([against.values(part).amax(dim=1) for part in unit(random_QD).split(VECTORS)]).sort().values
        part = side_table(side, vectors, against, texts, min(config.top, known), null_Q)
        share = part["random_share"].to_numpy()
        sides[side] = {
            "features": len(vectors.ids),
            "beyond_random": int((share <= 0.05).sum()),
            "random_largest": float(null_Q.median()),
        }
        tables.append(part)
    if not tables:
        raise BadInput("No direction of this adapter reads or writes the residual stream (q k v o gate up down).")
    shown = {*writes.ids, *reads.ids}
    polarities = [f"{address}{sign}" for address in adapter.addresses for sign in "+-"]
    elsewhere = sum(name not in shown for name in polarities)
    return pa.concat_tables(tables), {"features": len(shown), "directions_elsewhere": elsewhere, "sides": sides}


def residual_vectors(
    model: Any, adapter: Adapter, decoder_FN: npt.NDArray[np.floating] | None
) -> tuple[Vectors, Vectors]:
    """What features write to the residual stream (both polarities, then latents) and what polarities read from it.

    A polarity is that of the effect s·‖b‖·z: `+` writes b, whatever the sign of s, and reads a for s > 0, else -a.
    """
    written: list[tuple[str, Tensor]] = []
    read: list[tuple[str, Tensor]] = []
    latents_FD: Tensor | None = None
    for module, name in zip(adapter.modules, adapter.module_addresses, strict=True):
        if module.layer is None or module.type not in READS | WRITES:
            continue
        addresses = [name + (f"#{r}" if module.rank > 1 else "") for r in range(module.rank)]
        norms = layer_norms(model, module)
        if module.type in WRITES:
            b_RD = module.b_OR.T * norms.after[WRITES[module.type]].cpu()
            written += both_signs(addresses, module.scale * b_RD, float(np.sign(module.scale)) or 1.0)
            if decoder_FN is not None:
                if decoder_FN.shape[1] != len(adapter.addresses):
                    raise RunFailed("The SAE was trained on another adapter's scalars; train it again.")
                codes_FR = torch.from_numpy(np.asarray(decoder_FN[:, module.columns], np.float32))
                part_FD = codes_FR @ (module.scale * b_RD)
                latents_FD = part_FD if latents_FD is None else latents_FD + part_FD
        else:
            a_RD = module.a_RI * norms.before[READS[module.type]].cpu()
            read += both_signs(addresses, a_RD, float(np.sign(module.scale)) or 1.0)
    if latents_FD is not None:
        written += [(f"sae.{i}", vector_D) for i, vector_D in enumerate(latents_FD)]
    return stacked(written), stacked(read)


def both_signs(addresses: Sequence[str], vectors_RD: Tensor, sign: float) -> list[tuple[str, Tensor]]:
    """Each direction's vector for its polarity `+`, and turned round for `-`."""
    pairs = zip(addresses, sign * vectors_RD, strict=True)
    return [(f"{address}{mark}", vector if mark == "+" else -vector) for address, vector in pairs for mark in "+-"]


def stacked(named: Sequence[tuple[str, Tensor]]) -> Vectors:
    """Named vectors as one matrix."""
    return Vectors([name for name, _ in named], torch.stack([v for _, v in named]) if named else torch.empty(0, 0))


def unit(vectors_KD: Tensor) -> Tensor:
    """Vectors at length 1; what is 0 stays 0."""
    return vectors_KD / vectors_KD.norm(dim=1, keepdim=True).clamp_min(1e-30)


def side_table(
    side: str, vectors: Vectors, against: TokenTable, texts: Sequence[str], top: int, null_Q: Tensor
) -> pa.Table:
    """The rows of one side."""
    ends: dict[str, list[npt.NDArray[Any]]] = {"values": [], "ids": [], "bottom_values": [], "bottom_ids": []}
    parts = vectors.vectors_KD.split(VECTORS)
    for part_KD in progress(parts, len(parts), f"lens {side}", "part"):
        values_KV = against.values(unit(part_KD))
        for name, largest in (("", True), ("bottom_", False)):
            found = values_KV.topk(top, dim=1, largest=largest)
            ends[f"{name}values"].append(found.values.numpy())
            ends[f"{name}ids"].append(found.indices.numpy().astype(np.int32))
    columns = {name: np.concatenate(blocks) for name, blocks in ends.items()}
    # sorted null: how many random vectors reach at least as far
    reached_K = len(null_Q) - np.searchsorted(null_Q.numpy(), columns["values"][:, 0], side="left")
    table: dict[str, Any] = {
        "feature": vectors.ids,
        "side": [side] * len(vectors.ids),
        "norm": vectors.vectors_KD.norm(dim=1).numpy(),
    }
    for name in ("", "bottom_"):
        table[f"{name}tokens"] = [[texts[i] for i in row] for row in columns[f"{name}ids"]]
        table[f"{name}ids"] = list(columns[f"{name}ids"])
        table[f"{name}values"] = list(columns[f"{name}values"])
    table["random_share"] = (1 + reached_K) / (1 + len(null_Q))
    return pa.table(table)


def unembedding(model: Any, adapter: Adapter, known: int) -> TokenTable:
    """The LM head's rows behind the final norm's weight; a scaling or soft cap of logits would not change the order."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    norm = getattr(decoder_of(model, adapter), "norm", None)
    if weight is None or norm is None:
        raise unknown_architecture(model, "a final norm named `norm` and an LM head")
    fold_D = norm_weight(model, norm, weight.shape[1], weight.device)
    return TokenTable(weight.detach()[:known], fold_D, torch.ones(known, device=weight.device))


def embedding(model: Any, known: int) -> TokenTable:
    """The embedding's rows, each divided by its root mean square, as a norm does with a residual stream that holds
    nothing else; factors by which some models scale embeddings cancel."""
    weight_VD = model.get_input_embeddings().weight.detach()[:known]
    rms_V = torch.cat([rows.float().pow(2).mean(dim=1).sqrt() for rows in weight_VD.split(ROWS)])
    ones_D = torch.ones(weight_VD.shape[1], device=weight_VD.device)
    return TokenTable(weight_VD, ones_D, 1 / rms_V.clamp_min(1e-30))


def decoder_of(model: Any, adapter: Adapter) -> Any:
    """The module that holds the numbered layers and, in known architectures, the final norm."""
    for module in adapter.modules:
        if match := re.match(r"(.*?)\.?[^.]+\.\d+\.", module.path):
            return model.get_submodule(match[1])
    raise BadInput("The adapter adapts no numbered decoder layer, so the lens cannot tell where it reads and writes.")


def layer_norms(model: Any, module: AdaptedModule) -> Norms:
    """The weights of the norms around a layer's two blocks.

    Known are layers with a norm before attention (`input_layernorm`) and one before the MLP
    (`post_attention_layernorm`: Llama, Qwen, Mistral, …), and those with norms on both sides of each block (Gemma 2
    and 3, with `pre_feedforward_layernorm` and `post_feedforward_layernorm`).

    Raises:
        BadInput: the layer is built otherwise.
    """
    match = re.match(r".*?\.\d+(?=\.)", module.path)
    layer = model.get_submodule(match[0] if match else "")
    names = {name for name, _ in layer.named_children()}
    if {"input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"} <= names:
        before = {"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"}
        after = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    elif {"input_layernorm", "post_attention_layernorm"} <= names and "post_feedforward_layernorm" not in names:
        before, after = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}, {}
    else:
        raise unknown_architecture(model, "layers with input_layernorm and post_attention_layernorm")
    weight = model.get_input_embeddings().weight
    width = weight.shape[1]
    if width != (module.b_OR.shape[0] if module.type in WRITES else module.a_RI.shape[1]):
        raise unknown_architecture(model, "blocks as wide as its embedding")
    needed = {*before.values(), *after.values()}
    found = {name: norm_weight(model, getattr(layer, name), width, weight.device) for name in needed}
    ones_D = torch.ones(width)
    return Norms(
        {block: found[name] for block, name in before.items()},
        {block: found[after[block]] if block in after else ones_D for block in before},
    )


def norm_weight(model: Any, norm: nn.Module, width: int, device: torch.device) -> Tensor:
    """γ of an RMS norm, fp32 [D], whatever it calls or adds to it: read off what it does to vectors of ±1.

    Raises:
        BadInput: it is no RMS norm (it takes the mean away or has a bias).
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, width), generator=generator).float().mul(2).sub(1).to(device)
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    size = 256.0  # so large that the norm's epsilon vanishes, and exact in any precision
    gamma = norm((size * signs).to(dtype)).float() * signs
    if not torch.allclose(gamma[0], gamma[1], rtol=1e-3, atol=1e-4):
        raise unknown_architecture(model, "RMS norms")
    return gamma[0]


def unknown_architecture(model: Any, wanted: str) -> BadInput:
    """The one sentence for a model that the lens cannot see through."""
    kind = type(model).__name__
    return BadInput(f"The lens does not know the architecture {kind}: it needs {wanted}, as Llama, Qwen or Gemma have.")
