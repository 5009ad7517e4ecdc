"""Recording every scalar: tokens per second beside the bare trunk, and beside PEFT with a hook on every `lora_A`.

python benchmarks/record.py STUDY

The usual glue calls the whole model, LM head and all; `ratio_to_its_trunk_alone` is beside the same without the head.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MODEL, TRUNK, compare, gemm_rate, main, row

TRACES, REPEATS = 48, 4


def measure(study_path: Path) -> dict[str, Any]:
    """Our recording, writes and all, against both peers on the same batches."""
    from peft import PeftModel

    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused import fused_reading
    from lorascope.models import load_model
    from lorascope.recording import RecordConfig, adapter_scalars, fill_store, plan_recording
    from lorascope.study import Study
    from lorascope.traces import pad_ids

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device="cpu")
    rendered, _ = study.renderer(tokenizer).render_all(study.traces("train")[:TRACES])
    adapter = Adapter.load(study.path / "adapter")
    plan = plan_recording(adapter, rendered, RecordConfig().token_budget, {})
    batches = [batch for shard in plan.shards for batch in shard]
    tokens = sum(len(r.ids) for r in rendered)
    with_peft = PeftModel.from_pretrained(load_model(MODEL, device="cpu")[0], str(study.path / "adapter")).eval()
    seen: list[torch.Tensor] = []
    for name, module in with_peft.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, __, output: seen.append(output))

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, attach(model, adapter) as attached, fused_reading(attached):
            fill_store(Path(folder) / "store", plan, rendered, attached, adapter_scalars, "bench")

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            model.base_model(input_ids=pad_ids([rendered[i].ids for i in batch], 0)[0], use_cache=False)

    @torch.inference_mode()
    def hooks(part: Any) -> None:
        for batch in batches:
            part(input_ids=pad_ids([rendered[i].ids for i in batch], 0)[0], use_cache=False)
            torch.cat(seen, dim=-1).numpy().astype("float16")
            seen.clear()

    mine, trunk, against_bare = compare(ours, bare, REPEATS)
    _, hooked, against_hooks = compare(ours, partial(hooks, with_peft), REPEATS)
    _, _, without_head = compare(ours, partial(hooks, with_peft.get_base_model().base_model), REPEATS)
    share = 2 * TRUNK * tokens / mine / gemm_rate()
    return {
        "record_vs_bare": row(against_bare, tokens / mine, tokens / trunk, "tokens/s", share_of_gemm_limit=share),
        "record_vs_hooks": row(
            against_hooks, tokens / mine, tokens / hooked, "tokens/s", ratio_to_its_trunk_alone=without_head
        ),
    }


if __name__ == "__main__":
    main(measure)
