"""Kinds of features beside each other: the tables of `lorascope compare`, and what their tests say in words."""

from collections.abc import Sequence

from lorascope.columns import aligned
from lorascope.comparison_cells import METHOD
from lorascope.study import Study
from lorascope.views.reading import Json, json_file, missing

NAMES = {
    "direction": "directions",
    "latent": "latents",
    "neuron": "MLP neurons",
    "random": "random directions",
    "untrained": "untrained directions",
    "base": "the directions on the base model",
}
MEASURES = {
    "score": "Detection",
    "gain": "Detection above the wrong explanation's",
    "score_all": "Detection, failures as chance",
    "fuzzing": "Fuzzing",
    "fuzzing_gain": "Fuzzing above the wrong explanation's",
    "scored_share": "Share with a score",
    "class_0": "Share in class 0 (specific)",
    "class_1": "Share in class 1 (broad)",
    "class_2": "Share in class 2 (several things)",
    "reasoning": "Reasoning score",
}
"""What is tested, in words; the verdicts are given in this order."""
SHOWN = ("score", "gain", "score_all")
"""What is read without opening anything."""
CONTROLLED = {"score": "gain", "score_all": "gain", "fuzzing": "fuzzing_gain"}
"""Scores, and the same less the wrong explanation's."""
WHOSE = {
    "own": "with their own",
    "wrong": "with the wrong explanation",
    "shuffled": "on shuffled features",
}
NOTICED = 0.01
"""Share of answers that were not read above which it is said beside the verdict."""
GROUPS = {"third": "By layer third", "type": "By matrix type", "family": "By family of random directions"}
SURE = 0.05
"""Corrected p-value below which a difference is said to be found."""


def comparison_view(study: Study) -> Json:
    """The comparison, one table per explainer.

    Returns:
        `{"available", "corpus", "outdated": command or None, "missing_kinds": [{"kind", "label", "run"}],
        "stale_kinds", "tables": [{"explainer", "rows": [row with "label" and "drawn"], "outages": [sentence],
        "learned": [sentence], "remedies": [{"label", "run", "then"}], "tests": [test with "text"], "verdicts":
        [{"measure", "shown", "sentences", "families": [sentence]}], "by": [{"name", "label", "rows"}]}]}`; rows and
        tests are those of `compare`.
    """
    found = json_file(study, "compare/compare.json")
    if found is None:
        return missing(study, "the comparison of kinds of features", "lorascope compare STUDY")
    again = f"lorascope compare {study.path} --corpus {found['corpus']}"
    return {
        "available": True,
        "corpus": found["corpus"],
        "outdated": None if found.get("method") == METHOD else again,
        "missing_kinds": [entry | {"label": NAMES[entry["kind"]]} for entry in found["missing"]],
        "stale_kinds": [entry | {"label": NAMES[entry["kind"]]} for entry in found["stale"]],
        "tables": [explainer_table(found, explainer) for explainer in found["explainers"]],
    }


def explainer_table(found: Json, explainer: str) -> Json:
    """Everything that one explainer's features gave."""
    tests = worded([test for test in found["tests"] if test["explainer"] == explainer])
    halves = worded([test for test in found["by"]["family"]["tests"] if test["explainer"] == explainer])
    by = [
        {"name": name, "label": label, "rows": labelled(found["by"][name]["rows"], explainer)}
        for name, label in GROUPS.items()
    ]
    return {
        "explainer": explainer,
        "rows": labelled(found["rows"], explainer),
        "outages": outages(labelled(found["rows"], explainer)),
        "learned": uneven_training(labelled(found["rows"], explainer)),
        "remedies": remedies(tests),
        "tests": tests,
        "verdicts": [
            {
                "measure": words,
                "shown": measure in SHOWN,
                "sentences": sentences,
                "families": halves_said(measure, halves),
            }
            for measure, words in MEASURES.items()
            if (sentences := [test["text"] for test in tests if test["measure"] == measure])
        ],
        "by": [table for table in by if table["rows"]],
    }


def worded(tests: Sequence[Json]) -> list[Json]:
    """Tests with their `text`; a score's says so where the difference is not found above the wrong explanation's."""
    place = ("group", "first", "second")
    by_place = {(test["measure"], *(test[name] for name in place)): test for test in tests}
    return [
        test | {"text": verdict(test, by_place.get((CONTROLLED.get(test["measure"]), *(test[name] for name in place))))}
        for test in tests
    ]


def halves_said(measure: str, tests: Sequence[Json]) -> list[str]:
    """What the tests against each half of the random directions say of detection, as it is and controlled."""
    return [
        f"Against the {test['group']} half of the random ones: {test['text']}"
        for test in tests
        if test["measure"] == measure and measure in ("score", "gain")
    ]


def comparison_text(found: Json) -> str:
    """The result of `lorascope compare` for a terminal: a table and the tests of each explainer."""
    parts = []
    for explainer in found["explainers"]:
        table = explainer_table(found, explainer)
        classes = any(row["classes"] for row in table["rows"])
        columns = [
            "",
            "n",
            "scored",
            "detection",
            "wrong",
            "above wrong",
            "failures as chance",
            "fuzzing",
            "reasoning score",
        ]
        lines = [columns + (["class 0 / 1 / 2 / none"] if classes else [])]
        for row in table["rows"]:
            name = row["label"] + (f", {row['n']} of {row['features']} drawn" if row["drawn"] else "")
            cells = [name, str(row["n"]), str(row["scored"]), spread(row["score"]), spread(row["wrong"], bounds=False)]
            cells += [spread(row[measure]) for measure in ("gain", "score_all", "fuzzing", "reasoning")]
            lines.append(cells + ([class_shares(row)] if classes else []))
        parts.append(f"Explained by {explainer}, scored on {found['corpus']}: means over features with 95% intervals")
        parts.append("\n".join(aligned(lines)))
        for said in table["verdicts"]:
            head = f"{said['measure']} (p-values by Holm, over all tests of the table)"
            parts.append("\n  ".join([head, *said["sentences"], *said["families"]]))
        notes = [*table["outages"], *table["learned"]]
        notes += [f"To compare {way['label']}: `{way['run']}`{way['then']}." for way in table["remedies"]]
        parts += ["\n".join(notes)] if notes else []
    gone = [f"Not in the table: {NAMES[entry['kind']]}. Run: {entry['run']}" for entry in found["missing"]]
    gone += [
        f"Left out, of features that are no longer there: {NAMES[entry['kind']]} ({entry['explainer']}). Run: "
        f"{entry['run']}"
        for entry in found["stale"]
    ]
    parts += ["\n".join(gone)] if gone else []
    parts.append(
        "Shuffled controls, densities, segments, layer thirds and types: --json, compare/compare.json, the report."
    )
    return "\n\n".join(parts)


def spread(interval: Json | None, *, bounds: bool = True) -> str:
    """A mean with its interval, a dash where nothing is known."""
    if interval is None:
        return "-"
    value = f"{interval['value']:.3f}"
    if not bounds:
        return value
    if interval["low"] is None:
        return f"{value} (no interval)"
    return f"{value} ({interval['low']:.3f} to {interval['high']:.3f})"


def class_shares(row: Json) -> str:
    """The shares of the classes in percent, in their order."""
    return " / ".join(f"{share['value']:.0%}" for share in row["classes"].values()) if row["classes"] else "-"


def uneven_training(rows: Sequence[Json]) -> list[str]:
    """What was learned from fewer training tokens than the most, in words: such rows are not quite comparable."""
    most = max((row["training_tokens"] or 0 for row in rows), default=0)
    return [
        f"Explanations of {row['label']} were learned from {row['training_tokens']:,} ordinary tokens, others from up "
        f"to {most:,}."
        for row in rows
        if row["training_tokens"] and row["training_tokens"] < most
    ]


def outages(rows: Sequence[Json]) -> list[str]:
    """Which rows lack scores since requests failed, and in which more than a few answers were not read."""
    found = []
    for row in rows:
        if row.get("to_retry"):
            found.append(
                f"Left out of the scores of {row['label']}: {row['to_retry']:,} of {row['n']:,}, whose requests "
                "failed; the same `lorascope explain` sends them again."
            )
        shares = {whose: part["share"] or 0.0 for whose, part in (row.get("unread") or {}).items()}
        often = [f"{share:.1%} {WHOSE[whose]}" for whose, share in shares.items() if share > NOTICED]
        seldom = [f"{share:.1%} {WHOSE[whose]}" for whose, share in shares.items() if 0 < share <= NOTICED]
        if often:
            text = f"Of the scoring answers about {row['label']} were not read, and count as wrong: {', '.join(often)}"
            found.append(text + (f" ({', '.join(seldom)})." if seldom else "."))
    return found


def remedies(tests: Sequence[Json]) -> list[Json]:
    """What makes kinds comparable that are not: of each the first command, and what comes after it."""
    found = {test["not_compared"]["kind"]: test["not_compared"]["run"] for test in tests if test.get("not_compared")}
    explain = "`lorascope explain --kinds {}` with the earlier options"
    all_of_it = f" on all training traces, then `lorascope examples`, {explain} and `lorascope compare` again"
    return [
        {"label": NAMES[kind], "run": run}
        | {"then": all_of_it.format(kind) if run.startswith("lorascope record") else ", then `lorascope compare` again"}
        for kind, run in found.items()
    ]


def labelled(rows: Sequence[Json], explainer: str) -> list[Json]:
    """One explainer's rows with a label: the kind, drawn or whole."""
    return [
        row | {"label": NAMES[row["kind"]], "drawn": row["group"] is None and row["n"] < row["features"]}
        for row in rows
        if row["explainer"] == explainer
    ]


def verdict(test: Json, controlled: Json | None = None) -> str:
    """What a test says, no more: a difference with its direction, or that none was found and what would have been.

    Args:
        controlled: the same test of the scores less the wrong explanations'; said where only one of the two is found.
    """
    first, second = NAMES[test["first"]], NAMES[test["second"]]
    gap = test["difference"]
    if unequal := test.get("not_compared"):
        return (
            f"{sentence(first)} and {second}: not compared, since explanations of {NAMES[unequal['kind']]} were "
            f"learned from {min(unequal['tokens']):,} ordinary tokens and not from {max(unequal['tokens']):,}."
        )
    if test["p"] is None:
        return f"{sentence(first)} and {second}: too few to test (n = {test['n'][0]} and {test['n'][1]})."
    size = f"{gap_words(gap)}; {p_words(test['p_holm'])}"
    if test["p_holm"] < SURE:
        text = f"{sentence(first)} {'above' if gap['value'] > 0 else 'below'} {second} ({size})."
        if controlled and way_of(controlled) != way_of(test):
            words = MEASURES[controlled["measure"]]
            text += f" {'The other way round' if way_of(controlled) else 'Not found'} in {words[0].lower()}{words[1:]}."
    else:
        apart = gap["low"] is not None and (gap["low"] > 0 or gap["high"] < 0)
        found = "no difference found" + (" after correction" if apart else "")
        text = f"{sentence(first)} and {second}: {found} ({size})"
        if test["detectable"]:  # scores without any spread say nothing of what would have been found
            text += f"; a single test of this size finds one of {test['detectable']:.3f} or more four times in five"
        text += "."
    return (text + paired_words(test)).replace("-", "−")


def way_of(test: Json) -> int:
    """1 where the first is found above the second, -1 below, 0 where no difference is found."""
    found = test["p_holm"] is not None and test["p_holm"] < SURE
    return (1 if test["difference"]["value"] > 0 else -1) if found else 0


def sentence(words: str) -> str:
    """With a capital letter at the start."""
    return words[0].upper() + words[1:]


def paired_words(test: Json) -> str:
    """The same difference between what stands at the same addresses; nothing for kinds without them."""
    paired = test.get("paired")
    if not paired or paired["p_uncorrected"] is None:
        return ""
    size = f"{gap_words(paired['difference'])}; {p_words(paired['p_uncorrected'], 'uncorrected')}"
    return f" Paired at {paired['addresses']} addresses: {size}."


def gap_words(gap: Json) -> str:
    """A difference with its interval."""
    bounds = "no interval" if gap["low"] is None else f"{gap['low']:+.3f} to {gap['high']:+.3f}"
    return f"{gap['value']:+.3f}, {bounds}"


def p_words(p: float, kind: str = "corrected") -> str:
    """A p-value in words."""
    return f"{kind} p < 0.001" if p < 0.001 else f"{kind} p = {p:.2g}"
