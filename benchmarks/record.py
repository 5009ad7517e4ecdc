"""Recording every scalar: tokens per second beside the bare trunk, PEFT with a hook on every `lora_A`, and nnsight.

python benchmarks/record.py STUDY

The traces are whole batches of a plan of the whole corpus, evenly taken: padded, or packed, as when all
of it is recorded. The bare trunk runs the very batches that ours does, packed where ours packs, by torch's own
products; `..._prepacked` gives it our prepacked weights too, so that it tells what recording alone costs. The usual
glue pads batches in the corpus's order, of as many tokens, and calls the whole model, LM head and all;
`..._our_batches` gives it the batches that ours are made of, padded. A recording's fixed costs are counted but the
last, a pass over 16 traces for the length of the base's own outputs.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, MODEL, TRUNK, main, ratio, roofline, row, take_turns, versions

BUDGET = 2048
EVERY, REPEATS = (5, 12), (5, 2)
"""Every how many-th batch of the corpus is taken beside the trunk, and beside the slower glue; and how often."""


def consecutive(lengths: list[int], budget: int) -> list[list[int]]:
    """Batches in the corpus's order, of at most so many tokens with their padding."""
    batches: list[list[int]] = [[]]
    for i in range(len(lengths)):
        grown = [*batches[-1], i]
        if len(grown) * max(lengths[j] for j in grown) > budget and batches[-1]:
            batches.append([i])
        else:
            batches[-1] = grown
    return batches


def flat(shards: list[list[list[int]]]) -> list[list[int]]:
    """The batches of all shards."""
    return [batch for shard in shards for batch in shard]


def padding(batches: list[torch.Tensor], tokens: int) -> float:
    """Share of padding in some batches."""
    return 1 - tokens / sum(ids_BT.numel() for ids_BT in batches)


def measure(study_path: Path) -> dict[str, Any]:
    """Our recording, writes and all, against the peers on the same traces."""
    import nnsight
    from peft import PeftModel

    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused_reading import fused_reading
    from lorascope.models import load_model
    from lorascope.packing import prepare_packing
    from lorascope.prepacked import prepacked_maps
    from lorascope.recording import adapter_scalars, fill_stores, plan_recording
    from lorascope.study import Study
    from lorascope.traces import pad_ids, plan_batches

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    corpus, _ = study.renderer(tokenizer).render_all(study.traces("train"))
    whole = plan_batches([len(r.ids) for r in corpus], BUDGET)
    adapter = Adapter.load(study.path / "adapter")
    longest = max(len(r.ids) for r in corpus)
    plain, _ = load_model(MODEL, device=DEVICE)
    pack = DEVICE == "cpu" and prepare_packing(model, longest) and prepare_packing(plain, longest)
    with_peft = PeftModel.from_pretrained(load_model(MODEL, device=DEVICE)[0], str(study.path / "adapter")).eval()
    read = [(name, module) for name, module in with_peft.named_modules() if name.endswith("lora_A.default")]

    def sample(every: int) -> tuple[list[Any], Any]:
        """Traces of some of the corpus's batches, in its order, and the plan of recording them."""
        rendered = [corpus[i] for i in sorted(i for batch in whole[every // 2 :: every] for i in batch)]
        return rendered, plan_recording(adapter, rendered, BUDGET, {})

    def padded(rendered: list[Any], batches: list[list[int]]) -> list[torch.Tensor]:
        return [pad_ids([rendered[i].ids for i in batch], 0)[0].to(DEVICE) for batch in batches]

    def as_ours(rendered: list[Any], batches: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        if not pack:
            return [{"input_ids": ids_BT} for ids_BT in padded(rendered, batches)]
        rows = [torch.cat([torch.from_numpy(rendered[i].ids.astype("int64")) for i in batch]) for batch in batches]
        places = [torch.cat([torch.arange(len(rendered[i].ids)) for i in batch]) for batch in batches]
        return [{"input_ids": ids[None], "position_ids": at[None]} for ids, at in zip(rows, places, strict=True)]

    def ours(rendered: list[Any], plan: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, attach(model, adapter) as attached, fused_reading(attached):
            fill_stores([(Path(folder) / "store", plan)], rendered, attached, adapter_scalars, "bench", pack=pack)

    @torch.inference_mode()
    def bare(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            plain.base_model(**batch, use_cache=False)

    def bare_prepacked(batches: list[dict[str, torch.Tensor]]) -> None:
        with prepacked_maps(plain):
            bare(batches)

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

    def beside(name: str, times: dict[str, list[float]], tokens: int, **more: Any) -> dict[str, Any]:
        mine, theirs = (tokens / statistics.median(times[who]) for who in ("ours", name))
        repeats = len(times[name])
        return row(ratio(times, name), mine, theirs, "tokens/s", tokens=tokens, repeats=repeats, **more)

    many, few = (sample(every) for every in EVERY)
    planned = padded(few[0], flat(few[1].shards))
    in_order = padded(few[0], consecutive(few[1].lengths, BUDGET))
    trunk = as_ours(many[0], flat(many[1].shards))
    for warm_up in (partial(bare, trunk[:1]), partial(hooks, planned[:1]), partial(tracing, planned[:1])):
        warm_up()
    ours(*few)
    times = take_turns({"ours": partial(ours, *many), "bare": partial(bare, trunk)}, REPEATS[0], warmup=0)
    glue = {"hooks": partial(hooks, in_order), "hooks_alike": partial(hooks, planned)}
    glue |= {"ours": partial(ours, *few), "nnsight": partial(tracing, in_order)}
    glue["prepacked"] = partial(bare_prepacked, as_ours(few[0], flat(few[1].shards)))
    glue_times = take_turns(glue, REPEATS[1], warmup=0)
    tokens, fewer = (sum(plan.lengths) for _, plan in (many, few))
    moved = 4 * TRUNK * len(trunk) + 2 * tokens * len(adapter.addresses)
    limits = roofline(statistics.median(times["ours"]), 2 * TRUNK * tokens, moved)
    order, plan_padding = ({"padding": padding(batches, fewer)} for batches in (in_order, planned))
    peer = {"versions": versions("peft")}
    return {
        "record_vs_bare": beside("bare", times, tokens, packed=pack, **limits),
        "record_vs_bare_prepacked": beside("prepacked", glue_times, fewer, packed=pack),
        "record_vs_hooks": beside("hooks", glue_times, fewer, **order, **peer),
        "record_vs_hooks_our_batches": beside("hooks_alike", glue_times, fewer, **plan_padding, **peer),
        "record_vs_nnsight": beside("nnsight", glue_times, fewer, **order, versions=versions("nnsight", "peft")),
    }


if __name__ == "__main__":
    main(measure)
