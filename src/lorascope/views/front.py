"""The first page: what the study is, its headline numbers, and what stands out."""

from typing import Any

from lorascope.study import Study
from lorascope.views.ablation_tables import ablation_table
from lorascope.views.directions import open_directions
from lorascope.views.gains import recovery_view
from lorascope.views.reading import Json, json_file, missing, ready
from lorascope.views.unfinished import to_run


def overview(study: Study) -> Json:
    """What the study is and found.

    Returns:
        `{"available": True, "study", "model", "system", "markup", "adapter": {directions, rank, layers, types,
        parameters, basis_dependent} or missing, "corpora": [{"name", "traces", "tokens", "ordinary", "sinks",
        "recorded": [source, ..]}], "summary": summary.json, "recovery": that of `recovery_view`, "stand_out":
        [{"text", "feature" or None, "among": {"type" or "layer": value} or None}]}`; `among` says which directions a
        fact is about, `"to_run"` are the commands of stages that have not run, in order.
    """
    manifest = study.manifest
    shown = {
        "available": True,
        "study": study.path.resolve().name,
        "model": manifest["model"],
        "system": manifest.get("system"),
        "markup": manifest.get("markup"),
        "adapter": adapter_facts(study),
        "corpora": [corpus_facts(study, name) for name in study.corpora()],
        "summary": study.summary,
        "recovery": recovery_view(study),
        "stand_out": stand_out(study),
        "to_run": to_run(study),
    }
    return dict(ready(shown))


def adapter_facts(study: Study) -> Json:
    """Size and shape of the adapter."""
    adapter = open_directions(study)
    if adapter is None:
        return missing(study, "the adapter", "lorascope train STUDY")
    return {
        "available": True,
        "directions": len(adapter.addresses),
        "matrices": len(adapter.modules),
        "rank": adapter.rank,
        "alpha": adapter.config.get("lora_alpha"),
        "layers": len({m.layer for m in adapter.modules if m.layer is not None}),
        "types": list(dict.fromkeys(m.type for m in adapter.modules)),
        "parameters": sum(a_RI.size + b_OR.size for _, a_RI, b_OR, _ in adapter.factors()),
        "basis_dependent": adapter.rank > 1,
    }


def corpus_facts(study: Study, name: str) -> Json:
    """Size of a corpus, from its recordings where there are any."""
    entry = study.manifest["corpora"][name]
    facts: Json = {"name": name, "source": entry.get("source"), "traces": entry.get("traces"), "recorded": []}
    facts |= {"tokens": entry.get("tokens"), "ordinary": None, "sinks": None}
    for index in sorted((study.path / "scalars" / name).glob("[!.]*/index.json")):
        counts: dict[str, Any] = (json_file(study, str(index.relative_to(study.path))) or {}).get("counts") or {}
        facts["recorded"].append(index.parent.name)
        facts |= {key: counts[key] for key in ("traces", "tokens", "ordinary", "sinks") if key in counts}
    return facts


def stand_out(study: Study) -> list[Json]:
    """A few facts that a reader should look at first, each made from numbers of the study."""
    found: list[Json] = []
    for way, words in (("type", "Matrix type"), ("layer", "Layer"), ("direction", "Direction")):
        table = ablation_table(study, way)
        rows = [row for row in table.get("rows", []) if row["kl"] and not row["under_floor"]]
        if rows:
            kl = rows[0]["kl"]
            text = f"{words} whose absence changes the model most: {rows[0]['target']}"
            text += f", KL {kl['value']:.3g} nats per token"
            text += " (screened)" if rows[0]["method"] == "screen" else ""
            found.append(fact(text, way, rows[0]["target"]))
        elif table["available"]:
            found.append(fact(f"No {way} has a KL above the noise floor"))
    found += offset_share(study)
    return found


def fact(text: str, way: str = "", target: str = "") -> Json:
    """A fact with what it is about: one direction, or those of a type or a layer."""
    among = {way: target.removeprefix("L") if way == "layer" else target} if way in ("type", "layer") else None
    return {"text": text, "feature": f"{target}+" if way == "direction" else None, "among": among}


def offset_share(study: Study) -> list[Json]:
    """How much of the adapter's effect its constant part has: patching in each direction's mean scalar."""
    patched = json_file(study, "sae/patched_kl.json") or {}
    variants = patched.get("variants") or {}
    off, mean = (variants.get(name, {}).get("value") for name in ("off", "mean"))
    if not off or mean is None:
        return []
    text = f"Holding every scalar at its mean costs {mean:.3g} nats per token, switching the adapter off {off:.3g}: "
    text += f"{100 * mean / off:.0f}% as much, for losing all that varies from token to token"
    groups = {row["target"]: row for row in ablation_table(study, "group").get("rows", [])}
    tokens = patched.get("predicted_tokens")
    if tokens and (everything := groups.get("all")) and everything["kl"]:
        text += f" (measured on {tokens:,} tokens; the map's {everything['kl']['value']:.3g} for all directions is of"
        text += f" {everything['tokens']:,} others)"
    return [fact(text)]
