"""What `lorascope steer` prints for a reader: each prompt's answers under each other, those that are the same as one.

The result with all its numbers is in its file, and on stdout with --json.
"""

from collections.abc import Mapping
from textwrap import indent
from typing import Any

Json = Mapping[str, Any]
HEADS = {
    "steered": "steered",
    "plain": "same seed, unsteered",
    "control": "same moves along random vectors of equal length",
    "base": "base model, unsteered",
}
"""Runs in the order in which they are printed, and what each is."""


def steering_text(result: Json) -> str:
    """The whole result in words."""
    settings = result["settings"]
    where = "every token" if settings["where"] == "all" else "every generated token"
    drawn = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    about = f"On {where}; at most {settings['max_new_tokens']} new tokens, {drawn}, seed {settings['seed']}."
    moves = "\n".join(move_words(steer) for steer in result["steers"])
    prompts = "\n\n".join(prompt_words(row) for row in result["prompts"])
    return f"{moves}\n{about}\n\n{prompts}\n\nWith every token and activation in {result['file']} of the study."


def move_words(steer: Json) -> str:
    """`L12.gate+: add 4 times its 99th percentile, +15 effect`."""
    name, mode, amount = steer["feature"], steer["mode"], steer["amount"]
    if mode == "off":
        return f"{name}: off"
    if mode == "scale":
        return f"{name}: scaled by {amount:g}"
    verb = "add" if mode == "add" else "clamp to"
    unit = "activation" if steer["unit"] == "code" else "effect"
    return f"{name}: {verb} {amount:g} times the 99th percentile of its firings, {steer['change']:+.3g} in {unit}"


def prompt_words(row: Json) -> str:
    """One prompt with its runs."""
    runs = [run_words(row, name) for name in HEADS if name in row["runs"]]
    return "\n\n".join([f"Prompt: {row['prompt']}", *runs])


def run_words(row: Json, name: str) -> str:
    """One run with its head: its text, or that it is that of the run without any move."""
    head, run = HEADS[name], row["runs"][name]
    if name != "plain" and row["first_difference"][name] is None:
        return f"{head}: the same as unsteered"
    text = run["text"].strip("\n") or "(no text)"
    cut = "" if run["finished"] else "\n(cut off at the limit)"
    return f"{head}:\n{indent(text + cut, '  ')}"
