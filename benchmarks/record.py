"""Recording every scalar: tokens per second beside the bare trunk, PEFT with a hook on every `lora_A`, and nnsight.

python benchmarks/record.py STUDY

The usual glue calls the whole model, LM head and all; `ratio_to_its_trunk_alone` is beside the same without the head.
Peers pad the batches that ours lays end to end; `padding` is the share of padding, which falls as a corpus grows.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, MODEL, TRUNK, main, ratio, roofline, row, take_turns, versions

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
    from lorascope.packing import prepare_packing
    from lorascope.recording import adapter_scalars, fill_stores, plan_recording
    from lorascope.study import Study
    from lorascope.traces import pad_ids

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    plain, _ = load_model(MODEL, device=DEVICE)
    rendered, _ = study.renderer(tokenizer).render_all(study.traces("train")[:TRACES])
    adapter = Adapter.load(study.path / "adapter")
    plan = plan_recording(adapter, rendered, MOST_ON_CPU, {})
    batches = [batch for shard in plan.shards for batch in shard]
    tokens = sum(len(r.ids) for r in rendered)
    padded = sum(len(batch) * max(len(rendered[i].ids) for i in batch) for batch in batches)
    pack = DEVICE == "cpu" and prepare_packing(model, max(len(r.ids) for r in rendered))
    with_peft = PeftModel.from_pretrained(load_model(MODEL, device=DEVICE)[0], str(study.path / "adapter")).eval()
    seen: list[torch.Tensor] = []
    read = [(name, module) for name, module in with_peft.named_modules() if name.endswith("lora_A.default")]
    hooked_maps = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for _, module in read]

    def ids_of(batch: list[int]) -> torch.Tensor:
        return pad_ids([rendered[i].ids for i in batch], 0)[0].to(DEVICE)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, attach(model, adapter) as attached, fused_reading(attached):
            fill_stores([(Path(folder) / "store", plan)], rendered, attached, adapter_scalars, "bench", pack=pack)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            plain.base_model(input_ids=ids_of(batch), use_cache=False)

    @torch.inference_mode()
    def hooks(part: Any) -> None:
        for batch in batches:
            part(input_ids=ids_of(batch), use_cache=False)
            torch.cat(seen, dim=-1).cpu().numpy().astype("float16")
            seen.clear()

    traced = nnsight.NNsight(with_peft)
    outputs = [traced.get(name) for name, _ in read]

    @torch.inference_mode()
    def tracing() -> None:
        for batch in batches:
            with traced.trace(input_ids=ids_of(batch), use_cache=False):
                kept = nnsight.save(torch.cat([part.output for part in outputs], dim=-1))
            kept.cpu().numpy().astype("float16")

    trunk = partial(hooks, with_peft.get_base_model().base_model)
    times = take_turns({"ours": ours, "bare": bare, "hooks": partial(hooks, with_peft), "trunk": trunk}, REPEATS)
    for handle in hooked_maps:
        handle.remove()
    traced_times = take_turns({"ours": ours, "nnsight": tracing}, REPEATS)
    mine = statistics.median(times["ours"])

    def speed(name: str) -> float:
        return tokens / statistics.median(times[name])

    moved = 4 * TRUNK * len(batches) + 2 * tokens * len(adapter.addresses)
    limits = roofline(mine, 2 * TRUNK * tokens, moved)
    peer = versions("peft")
    in_nnsight = row(
        ratio(traced_times, "nnsight"),
        tokens / statistics.median(traced_times["ours"]),
        tokens / statistics.median(traced_times["nnsight"]),
        "tokens/s",
    )
    beside_hooks = row(ratio(times, "hooks"), speed("ours"), speed("hooks"), "tokens/s")
    return {
        "record_vs_bare": row(
            ratio(times, "bare"), speed("ours"), speed("bare"), "tokens/s", padding=1 - tokens / padded, **limits
        ),
        "record_vs_hooks": beside_hooks | {"ratio_to_its_trunk_alone": ratio(times, "trunk"), "versions": peer},
        "record_vs_nnsight": in_nnsight | {"versions": versions("nnsight", "peft")},
    }


if __name__ == "__main__":
    main(measure)
