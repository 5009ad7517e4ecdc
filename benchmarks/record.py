"""Recording every scalar: tokens per second beside the bare trunk, PEFT with a hook on every `lora_A`, and nnsight.

python benchmarks/record.py STUDY

The traces are whole batches of a plan of the whole corpus, evenly taken: padded, or packed, as when all
of it is recorded. The bare trunk runs the very batches that ours does, packed where ours packs. The usual glue pads
batches in the corpus's order, of as many tokens, and calls the whole model, LM head and all; `..._our_batches` gives it
the batches that ours are made of, padded. A recording's fixed costs are counted but the last, a pass over 16 traces for
the length of the base's own outputs.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, MODEL, TRUNK, main, ratio, roofline, row, take_turns, versions

BUDGET, EVERY, REPEATS = 2048, 12, 3


def consecutive(lengths: list[int], budget: int) -> list[list[int]]:
    """Batches in the corpus's order, of at most so many tokens with their padding."""
    batches: list[list[int]] = []
    for i, length in enumerate(lengths):
        longest = max([length, *(lengths[j] for j in batches[-1])]) if batches else budget
        if longest * (len(batches[-1]) + 1 if batches else 1) > budget or not batches:
            batches.append([])
        batches[-1].append(i)
    return batches


def padding(batches: list[torch.Tensor], tokens: int) -> float:
    """Share of padding in some batches."""
    return 1 - tokens / sum(ids_BT.numel() for ids_BT in batches)


def measure(study_path: Path) -> dict[str, Any]:
    """Our recording, writes and all, against the peers on the same traces."""
    import nnsight
    from peft import PeftModel

    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused import fused_reading
    from lorascope.models import load_model
    from lorascope.packing import prepare_packing
    from lorascope.recording import adapter_scalars, fill_stores, plan_recording
    from lorascope.study import Study
    from lorascope.traces import pad_ids, plan_batches

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    corpus, _ = study.renderer(tokenizer).render_all(study.traces("train"))
    taken = plan_batches([len(r.ids) for r in corpus], BUDGET)[EVERY // 2 :: EVERY]
    rendered = [corpus[i] for i in sorted(i for batch in taken for i in batch)]
    adapter = Adapter.load(study.path / "adapter")
    plan = plan_recording(adapter, rendered, BUDGET, {})
    batches = [batch for shard in plan.shards for batch in shard]
    tokens = sum(len(r.ids) for r in rendered)
    pack = DEVICE == "cpu" and prepare_packing(model, max(len(r.ids) for r in rendered))
    plain, _ = load_model(MODEL, device=DEVICE)
    if pack:
        prepare_packing(plain, max(len(r.ids) for r in rendered))
    with_peft = PeftModel.from_pretrained(load_model(MODEL, device=DEVICE)[0], str(study.path / "adapter")).eval()
    read = [(name, module) for name, module in with_peft.named_modules() if name.endswith("lora_A.default")]

    def padded(batches: list[list[int]]) -> list[torch.Tensor]:
        return [pad_ids([rendered[i].ids for i in batch], 0)[0].to(DEVICE) for batch in batches]

    def packed(batch: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.from_numpy(rendered[i].ids.astype("int64")) for i in batch])
        return {"input_ids": ids[None], "position_ids": torch.cat([torch.arange(plan.lengths[i]) for i in batch])[None]}

    planned, in_order = padded(batches), padded(consecutive(plan.lengths, BUDGET))
    as_ours = [packed(batch) for batch in batches] if pack else [{"input_ids": ids_BT} for ids_BT in planned]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, attach(model, adapter) as attached, fused_reading(attached):
            fill_stores([(Path(folder) / "store", plan)], rendered, attached, adapter_scalars, "bench", pack=pack)

    @torch.inference_mode()
    def bare(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            plain.base_model(**batch, use_cache=False)

    @torch.inference_mode()
    def hooks(batches: list[torch.Tensor]) -> None:
        seen: list[torch.Tensor] = []
        handles = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for _, module in read]
        for ids_BT in batches:
            with_peft(input_ids=ids_BT, use_cache=False)
            torch.cat(seen, dim=-1).cpu().numpy().astype("float16")
            seen.clear()
        for handle in handles:
            handle.remove()

    traced = nnsight.NNsight(with_peft)
    outputs = [traced.get(name) for name, _ in read]

    @torch.inference_mode()
    def tracing(batches: list[torch.Tensor]) -> None:
        for ids_BT in batches:
            with traced.trace(input_ids=ids_BT, use_cache=False):
                kept = nnsight.save(torch.cat([part.output for part in outputs], dim=-1))
            kept.cpu().numpy().astype("float16")

    for warm_up in (partial(bare, as_ours[:1]), partial(hooks, planned[:1]), partial(tracing, planned[:1]), ours):
        warm_up()
    contestants = {"ours": ours, "bare": partial(bare, as_ours), "hooks": partial(hooks, in_order)}
    contestants |= {"hooks_alike": partial(hooks, planned), "nnsight": partial(tracing, in_order)}
    times = take_turns(contestants, REPEATS, warmup=0)
    mine = statistics.median(times["ours"])
    moved = 4 * TRUNK * len(batches) + 2 * tokens * len(adapter.addresses)
    limits = roofline(mine, 2 * TRUNK * tokens, moved)

    def beside(name: str, **more: Any) -> dict[str, Any]:
        theirs = tokens / statistics.median(times[name])
        return row(ratio(times, name), tokens / mine, theirs, "tokens/s", tokens=tokens, repeats=REPEATS, **more)

    peer = versions("peft")
    return {
        "record_vs_bare": beside("bare", packed=pack, **limits),
        "record_vs_hooks": beside("hooks", padding=padding(in_order, tokens), versions=peer),
        "record_vs_hooks_our_batches": beside("hooks_alike", padding=padding(planned, tokens), versions=peer),
        "record_vs_nnsight": beside("nnsight", padding=padding(in_order, tokens), versions=versions("nnsight", "peft")),
    }


if __name__ == "__main__":
    main(measure)
