"""Steered generation: tokens per second with one direction pushed on every generated token, beside PEFT unsteered.

    python benchmarks/steer.py STUDY

Both continue the same prompts greedily in one batch, by as many tokens: no row may end early.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import DEVICE, HEAD, MODEL, TRUNK, compare, main, roofline, row

PROMPTS, NEW, REPEATS = 8, 64, 5


def measure(study_path: Path) -> dict[str, Any]:
    """One row."""
    from peft import PeftModel

    from lorascope import edits
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.generation import Sampling, generate_batch
    from lorascope.models import load_model
    from lorascope.prepacked import prepacked_maps
    from lorascope.study import Study

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    renderer = study.renderer(tokenizer)
    prompts = [renderer.prompt_ids(trace.question) for trace in study.traces("heldout")[:PROMPTS]]
    adapter = Adapter.load(study.path / "adapter")
    with_peft = PeftModel.from_pretrained(load_model(MODEL, device=DEVICE)[0], str(study.path / "adapter")).eval()
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id or 0
    ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=DEVICE)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)

    def ours() -> None:
        with (
            torch.no_grad(),
            prepacked_maps(model),
            attach(model, adapter) as attached,
            attached.edit(edits.add("L20.gate", 1.0)),
        ):
            results = generate_batch(attached, renderer, prompts, Sampling(max_new_tokens=NEW, min_new_tokens=NEW))
            assert all(len(result.ids) == NEW for result in results)

    @torch.no_grad()
    def peer() -> None:
        with_peft.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )

    mine, theirs, ratio = compare(ours, peer, REPEATS)
    made = PROMPTS * NEW
    limits = roofline(mine, 2 * (TRUNK + HEAD) * made, 4 * (TRUNK + HEAD) * NEW)
    return {"steer_vs_peft": row(ratio, made / mine, made / theirs, "tokens/s", tokens=made, **limits)}


if __name__ == "__main__":
    main(measure)
