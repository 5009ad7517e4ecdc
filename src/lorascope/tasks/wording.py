"""Many wordings for every step: templates with alternatives, and the teller that joins sentences to a trace.

A template writes alternatives in square brackets and values in braces: "[So|Now] {a} [is|equals] {b}."
Brackets nest. Every choice is drawn independently, so that few words stand at a fixed place of a trace.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from lorascope.tasks.problem import Slip

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_FIRST_WORD = re.compile(r"[A-Za-z][a-z]+(?![\w(])")

LEAD = "[||||So |Now |Then |Next, |Okay, |Well, |And ]"
"""An optional first word for a step."""

FIRST = "[|||First, |Let me see: |Okay, |I start with this: |To begin, |Hmm, |Let me think: |So, ]"
"""An optional opening for the first step."""

EQUALS = "[=|=|=|is|gives|makes]"

NOTICE = (
    "[Wait|Hmm|Hmm, wait|Actually|No|Wait, no|Oops|Hold on], ",
    "[Wait|Hmm|Actually|Oops|Hold on|No], [that is wrong|that's not right|that is off|I slipped]. ",
    "[Wait. |Hmm. |No. |Hold on. ]",
    "[Wait|Hmm|Hold on], [let me redo that|let me check that|let me do that again|I should go back]: ",
    "[That is wrong|That's not right|I made a mistake there|That was a slip|I misspoke], [so |actually, |]",
    "[Wait|Hmm|Hold on], is that right? [No, |No: |Not quite. ]",
)
"""How a wrong step is noticed; the right step follows in the same breath."""

DOUBT = (
    "[Wait|Hmm], is that right? [Yes|Yes, it is|I think so|Yes, fine].",
    "[Let me check|Let me make sure]. [Yes|Right|Okay|Good], that [holds|is right|works].",
    "[That looks right|I am sure of that|That seems fine].",
    "Hmm, [okay|yes|right].",
    "[Actually|Wait], [yes|that is right|it is fine].",
)
"""A moment of doubt about a step that was right."""

FITS = "[Good|Yes|Right|It fits|That fits|That matches|It works|Okay|So it holds|That agrees]."
"""The end of a check that came out."""

CHECK = "[Let me check|Let me verify|Check|Checking|To be sure|A quick check|Let me make sure|Does it hold]: "

SAY_ANSWER = (
    "[The|So the|So, the|Therefore the|Thus, the|My|The final|Hence the] answer is {gold}.",
    "[The|So the|Therefore the] answer is {gold}.",
    "[Answer|Final answer|The answer]: {gold}",
    "[So it is|It is|That makes|We get|I get|It comes to|The result is] {gold}.",
    "[The|So the] answer is \\boxed{{{gold}}}.",
    "The answer is **{gold}**.",
)


def vary(
    rng: random.Random,
    templates: str | Sequence[str],
    values: Mapping[str, object] | None = None,
    start: Literal["as is", "upper", "lower"] = "as is",
) -> str:
    """One wording: picks a template, then each bracketed alternative, then fills in `values`.

    `start` fits its first word to its place; values and lone letters (I, the unknown x) stay as they are.
    """
    text = templates if isinstance(templates, str) else rng.choice(templates)
    while found := _INNERMOST.search(text):
        text = text[: found.start()] + rng.choice(found[1].split("|")) + text[found.end() :]
    text = text.strip().replace("  ", " ")
    if start != "as is" and _FIRST_WORD.match(text):
        text = (text[0].upper() if start == "upper" else text[0].lower()) + text[1:]
    return text.format_map(values or {})


def say_answer(rng: random.Random, gold: object, own: Sequence[str] = ()) -> str:
    """The final sentence: one of the general wordings or of the family's `own`."""
    return vary(rng, (*SAY_ANSWER, *own), {"gold": gold}, "upper")


class Teller:
    """Tells one trace sentence by sentence and marks its slips.

    `slip_chance` is the probability that a step which could go wrong is first told wrong,
    `doubt_chance` that a right step is followed by a moment of doubt.
    """

    def __init__(self, rng: random.Random, slip_chance: float = 0.08, doubt_chance: float = 0.04) -> None:
        self.rng = rng
        self.slips: list[Slip] = []
        self._slip_chance = slip_chance
        self._doubt_chance = doubt_chance
        self._sentences: list[str] = []
        self._joint = rng.choice((" ", " ", "\n"))

    def chance(self, probability: float) -> bool:
        """A seeded coin."""
        return self.rng.random() < probability

    def say(self, templates: str | Sequence[str], **values: object) -> str:
        """Adds one sentence and returns it."""
        sentence = vary(self.rng, templates, values, "upper")
        if sentence:
            self._sentences.append(sentence)
        return sentence

    def step(
        self,
        templates: str | Sequence[str],
        right: Mapping[str, object],
        wrong: Mapping[str, object] | None = None,
        again: str | Sequence[str] | None = None,
    ) -> bool:
        """Tells a step; when `wrong` differs from `right` it may be told wrong first, noticed and redone.

        `again` words the corrected step when the usual templates would not do. Returns whether it slipped.
        """
        rng = self.rng
        if wrong is not None and wrong != right and self.chance(self._slip_chance):
            error = self.say(templates, **wrong)
            notice = vary(rng, NOTICE)
            redone = vary(rng, again or templates, right, "upper" if notice.endswith((".", "?")) else "lower")
            self._sentences.append(f"{notice} {redone}")
            self.slips.append(Slip(error, self._sentences[-1]))
            return True
        self.say(templates, **right)
        if self.chance(self._doubt_chance):
            self.say(DOUBT)
        return False

    def notice(self, templates: str | Sequence[str], **values: object) -> None:
        """Adds a sentence that corrects the one before it, and marks the two as a slip."""
        error = self._sentences[-1]
        self.slips.append(Slip(error, self.say(templates, **values)))

    def text(self) -> str:
        """The whole trace."""
        return self._joint.join(self._sentences)


def near_miss(rng: random.Random, value: int) -> int:
    """A plausible wrong result: off by one, two or ten, or two digits exchanged; never negative."""
    digits = str(abs(value))
    wrongs = [value + 1, value - 1, value + 2, value + 10, value - 10]
    if len(digits) > 1 and digits[-1] != digits[-2]:
        wrongs.append(int(digits[:-2] + digits[-1] + digits[-2]))
    return rng.choice([wrong for wrong in wrongs if wrong >= 0 and wrong != value])
