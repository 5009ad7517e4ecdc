"""The lens: top tokens of what directions and latents write to the residual stream, and of what directions read there.

A write v (of o, down or their like, or a latent's through both) adds W_U·(γ ⊙ v) / r to the logits, where γ is the
weight of the final norm and r the length by which it divides, which is taken as constant: so tokens are ranked by
W_U·(γ ⊙ v). A read a (of q k v gate up or fused ones) sees γ ⊙ h / rms(h) of the residual stream h, γ of its own
layer's norm. On a token's embedding e alone that is a·(γ ⊙ e) / rms(e): embeddings are normalised as the model's own
norm does it, so that long ones do not lead every list; where maps read the stream without a norm, they are as they
are. A LayerNorm subtracts the mean first. So each side is one vector of the residual stream (v, or γ ⊙ a) against one
table with a row per token. Values are for that vector at length 1, about their mean over the vocabulary: a softmax does
not see the mean. All is linear and direct: what later layers make of a write is left out.

Shape legend: K vectors, D model width, V vocabulary, Q random vectors, F latents, J tokens listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file
from torch import Tensor

from lorascope.adapter import Adapter
from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.progress import progress
from lorascope.residual_norms import Norm, Norms, find_norms, unknown_architecture
from lorascope.study import Study, atomic_write_bytes
from lorascope.token_text import open_tokenizer, vocabulary_texts

LENS = "lens/lens.parquet"
SAE_WEIGHTS = "sae/sae_weights.safetensors"
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
    """Rows to compare a vector of the residual stream with: value = row·norm(vector) · scale, minus the mean."""

    weight_VD: Tensor
    """In the model's dtype, on its device."""
    norm: Norm
    scale_V: Tensor

    def values(self, vectors_KD: Tensor) -> Tensor:
        """Values of all tokens about their mean over the vocabulary, fp32 [K, V], on the CPU."""
        folded_KD = self.norm.of_write(vectors_KD.to(self.weight_VD.device))
        parts = [folded_KD @ rows_VD.float().T for rows_VD in self.weight_VD.split(ROWS)]
        values_KV = torch.cat(parts, dim=1) * self.scale_V
        return (values_KV - values_KV.mean(dim=1, keepdim=True)).cpu()


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
        BadInput: the norms around the residual stream are not found.
    """
    norms = find_norms(model, adapter)
    writes, reads = residual_vectors(norms, adapter, decoder_FN)
    known = min(len(texts), model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    tables: list[pa.Table] = []
    sides: dict[str, Any] = {}
    for side, vectors in (("write", writes), ("read", reads)):
        if not vectors.ids:
            continue
        against = unembedding(model, norms, known) if side == "write" else embedding(model, norms, known)
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
        raise BadInput("No direction of this adapter is known to read or write the residual stream, as q or down do.")
    shown = {*writes.ids, *reads.ids}
    polarities = [f"{address}{sign}" for address in adapter.addresses for sign in "+-"]
    elsewhere = sum(name not in shown for name in polarities)
    return pa.concat_tables(tables), {"features": len(shown), "directions_elsewhere": elsewhere, "sides": sides}


def residual_vectors(
    norms: Norms, adapter: Adapter, decoder_FN: npt.NDArray[np.floating] | None
) -> tuple[Vectors, Vectors]:
    """What features write to the residual stream (both polarities, then latents) and what polarities read from it.

    A polarity is that of the effect s·‖b‖·z: `+` writes b, whatever the sign of s, and reads a for s > 0, else -a.
    """
    written: list[tuple[str, Tensor]] = []
    read: list[tuple[str, Tensor]] = []
    latents_FD: Tensor | None = None
    for module, name in zip(adapter.modules, adapter.module_addresses, strict=True):
        addresses = [name + (f"#{r}" if module.rank > 1 else "") for r in range(module.rank)]
        sign = float(np.sign(module.scale)) or 1.0
        if module.path in norms.writes:
            norm = norms.writes[module.path]
            b_RD = norm.of_write(module.b_OR.T) if norm else module.b_OR.T
            written += both_signs(addresses, module.scale * b_RD, sign)
            if decoder_FN is not None:
                if decoder_FN.shape[1] != len(adapter.addresses):
                    raise RunFailed("The SAE was trained on another adapter's scalars; train it again.")
                codes_FR = torch.from_numpy(np.asarray(decoder_FN[:, module.columns], np.float32))
                part_FD = codes_FR @ (module.scale * b_RD)
                latents_FD = part_FD if latents_FD is None else latents_FD + part_FD
        elif module.path in norms.reads:
            norm = norms.reads[module.path]
            read += both_signs(addresses, norm.of_read(module.a_RI) if norm else module.a_RI, sign)
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


def unembedding(model: Any, norms: Norms, known: int) -> TokenTable:
    """The LM head's rows behind the final norm; a scaling or soft cap of logits would not change the order."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        raise unknown_architecture(model, "an LM head with a weight")
    return TokenTable(weight.detach()[:known], norms.final, torch.ones(known, device=weight.device))


def embedding(model: Any, norms: Norms, known: int) -> TokenTable:
    """The embedding's rows, each divided by its length as the norms before reads do it with a residual stream that
    holds nothing else; factors by which some models scale embeddings cancel.

    Raises:
        BadInput: some reads pass norms of another kind than others.
    """
    kinds = {norm and norm.centred for norm in norms.reads.values()}
    if len(kinds) > 1:
        raise unknown_architecture(model, "the same kind of norm before all maps that read the residual stream")
    centred = kinds.pop()
    weight_VD = model.get_input_embeddings().weight.detach()[:known]
    same = Norm(torch.ones(weight_VD.shape[1]), bool(centred))
    if centred is None:
        return TokenTable(weight_VD, same, torch.ones(known, device=weight_VD.device))
    wide = (rows_VD.float() for rows_VD in weight_VD.split(ROWS))
    rms_V = torch.cat([(rows - rows.mean(1, keepdim=True) if centred else rows).pow(2).mean(1).sqrt() for rows in wide])
    return TokenTable(weight_VD, same, 1 / rms_V.clamp_min(1e-30))
