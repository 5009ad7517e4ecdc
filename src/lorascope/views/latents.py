"""How good the SAE is: variance unexplained, sparsity, and what its reconstruction costs the model."""

from lorascope.study import Study
from lorascope.views.feature_list import sae_config
from lorascope.views.reading import Json, interval, json_file, json_lines, missing, ready

VARIANTS = {
    "exact": ("the exact scalars (floor)", "floor"),
    "sae": ("the SAE's reconstruction", "sae"),
    "components": ("{components} principal components", "baseline"),
    "largest": ("the {components} largest scalars", "baseline"),
    "mean": ("each direction's mean scalar", "baseline"),
    "off": ("adapter off (the base model)", "off"),
}
"""Variant of the patched KL: what is put in the scalars' place, and its role in a chart."""


def sae_page(study: Study) -> Json:
    """Quality of the SAE and its patched KL.

    Returns:
        `{"available", "quality": {fvu_effect, fvu_std, fvu_unit, pca_fvu_*, l0, dead, dead_latents, latents,
        components, heldout_tokens, training_tokens, unit, training_seconds}, "k", "worst_directions": [{"address",
        "fvu"}], "curve": {"steps", "fvu"}, "patched": {"available", "rows": [{"key", "label", "role", "kl":
        {"value", "low", "high"}}], "ratio": interval
        or None, "predicted_tokens", "tokens", "traces", "floor", "corpus"}}`.
    """
    quality = json_file(study, "sae/metrics.json")
    if quality is None:
        return missing(study, "the SAE", "lorascope sae STUDY") | {"patched": patched(study)}
    metadata = sae_config(study).get("metadata", {})
    lost = quality.pop("fvu_per_direction", None) or []
    quality.pop("firing_share", None)
    addresses = metadata.get("addresses", [])
    pairs = [(f, a) for a, f in zip(addresses, lost, strict=False) if f is not None]
    worst = [{"address": address, "fvu": fvu} for fvu, address in sorted(pairs, reverse=True)[:6]]
    steps = [row for row in json_lines(study, "sae/training.jsonl") if row.get("fvu") is not None]
    page = {
        "available": True,
        "quality": quality,
        "k": metadata.get("k"),
        "worst_directions": worst,
        "curve": {"steps": [row["step"] for row in steps], "fvu": [row["fvu"] for row in steps]},
        "patched": patched(study),
    }
    return dict(ready(page))


def patched(study: Study) -> Json:
    """The patched KL of the SAE beside its baselines, floor first and adapter off last."""
    found = json_file(study, "sae/patched_kl.json")
    if found is None:
        return missing(study, "the patched KL", "lorascope sae STUDY")
    rows: list[Json] = []
    variants: Json = found.get("variants") or {}
    for key in sorted(variants, key=lambda k: list(VARIANTS).index(k) if k in VARIANTS else len(VARIANTS) - 1):
        label, role = VARIANTS.get(key, (key, "baseline"))
        label = label.format(components=found.get("components", 16))
        rows.append({"key": key, "label": label, "role": role, "kl": interval(variants[key])})
    kept = {key: found.get(key) for key in ("ratio", "tokens", "predicted_tokens", "traces", "floor", "corpus")}
    return {"available": True, "rows": rows} | kept
