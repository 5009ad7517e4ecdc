"""Recording every scalar: tokens per second beside the bare trunk, PEFT with a hook on every `lora_A`, and nnsight.

python benchmarks/record.py STUDY

The usual glue calls the whole model, LM head and all; `ratio_to_its_trunk_alone` is beside the same without the head.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, MODEL, TRUNK, compare, main, roofline, row

TRACES, REPEATS = 48, 4


def measure(study_path: Path) -> dict[str, Any]:
    """Our recording, writes and all, against both peers on the same batches."""
    import nnsight
    from peft import PeftModel

    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused import fused_reading
    from lorascope.memory import MOST_ON_CPU
    from lorascope.models import load_model
    from lorascope.recording import adapter_scalars, fill_stores, plan_recording
    from lorascope.study import Study
    from lorascope.traces import pad_ids

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    rendered, _ = study.renderer(tokenizer).render_all(study.traces("train")[:TRACES])
    adapter = Adapter.load(study.path / "adapter")
    plan = plan_recording(adapter, rendered, MOST_ON_CPU, {})
    batches = [batch for shard in plan.shards for batch in shard]
    tokens = sum(len(r.ids) for r in rendered)
    with_peft = PeftModel.from_pretrained(load_model(MODEL, device=DEVICE)[0], str(study.path / "adapter")).eval()
    seen: list[torch.Tensor] = []
    read = [(name, module) for name, module in with_peft.named_modules() if name.endswith("lora_A.default")]
    hooked_maps = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for _, module in read]

    def ids_of(batch: list[int]) -> torch.Tensor:
        return pad_ids([rendered[i].ids for i in batch], 0)[0].to(DEVICE)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, attach(model, adapter) as attached, fused_reading(attached):
            fill_stores([(Path(folder) / "store", plan)], rendered, attached, adapter_scalars, "bench")

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            model.base_model(input_ids=ids_of(batch), use_cache=False)

    @torch.inference_mode()
    def hooks(part: Any) -> None:
        for batch in batches:
            part(input_ids=ids_of(batch), use_cache=False)
            torch.cat(seen, dim=-1).cpu().numpy().astype("float16")
            seen.clear()

    mine, trunk, against_bare = compare(ours, bare, REPEATS)
    _, hooked, against_hooks = compare(ours, partial(hooks, with_peft), REPEATS)
    _, _, without_head = compare(ours, partial(hooks, with_peft.get_base_model().base_model), REPEATS)
    for handle in hooked_maps:
        handle.remove()
    traced = nnsight.NNsight(with_peft)
    outputs = [traced.get(name) for name, _ in read]

    @torch.inference_mode()
    def tracing() -> None:
        for batch in batches:
            with traced.trace(input_ids=ids_of(batch), use_cache=False):
                kept = nnsight.save(torch.cat([part.output for part in outputs], dim=-1))
            kept.cpu().numpy().astype("float16")

    _, in_nnsight, against_nnsight = compare(ours, tracing, REPEATS)
    moved = 4 * TRUNK * len(batches) + 2 * tokens * len(adapter.addresses)
    limits = roofline(mine, 2 * TRUNK * tokens, moved)
    return {
        "record_vs_bare": row(against_bare, tokens / mine, tokens / trunk, "tokens/s", **limits),
        "record_vs_hooks": row(
            against_hooks, tokens / mine, tokens / hooked, "tokens/s", ratio_to_its_trunk_alone=without_head
        ),
        "record_vs_nnsight": row(against_nnsight, tokens / mine, tokens / in_nnsight, "tokens/s"),
    }


if __name__ == "__main__":
    main(measure)
