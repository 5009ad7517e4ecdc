"""Counting a letter in a word by spelling it out."""

from __future__ import annotations

import random
from functools import cache
from importlib import resources

from lorascope.tasks.problem import Draft
from lorascope.tasks.wording import FIRST, FITS, Teller, say_answer, vary

_LENGTHS = {1: (4, 7), 2: (8, 9), 3: (10, 14), 4: (4, 8), 5: (6, 10)}
_WORDS_ASKED = {1: 1, 2: 1, 3: 1, 4: 2, 5: 4}

_ASK = (
    "How many [times does {l} appear|times is {l} used|letters {l} are there] in [the word |the text |]{w}?",
    "[Count|Please count|Find|Tell me] the [number of|letters] {l} in [the word |]{w}.",
    "How often does [the letter |]{l} [occur|appear|come up] in {w}?",
    "[In|Looking at] [the word |]{w}, how [often is there a|many times do you see] {l}?",
    "{w}: how many [letters|times] {l}?",
    "[What is the count of|What is the number of|How frequent is] [the letter |]{l} in {w}?",
)
_OPEN = (
    FIRST + "[spell it|I spell it|letter by letter|let me spell it|the letters are|one by one]: {letters}.",
    "[Spelling|I spell|Spell] {w}: {letters}.",
    "{letters}.",
    "[Letters|The letters|In letters|Spelled out]: {letters}.",
    "[The word|It|This word|The text|Slowly, it] [is|goes|has|reads]: {letters}.",
)
_COUNT = (
    "[That is|That makes|So|I count|There are|I see|I find|In all] {n}.",
    "[So |Then |Now ]{l} [comes|is there|appears|occurs] {times}.",
    "[Count of|Number of] {l}: {n}.",
    "{l}: {n}[.| in all.| times.]",
    "[The count is|The total is|Counted|Altogether] {n}.",
)
_TIMES = {0: "not at all", 1: "once", 2: "twice"}


@cache
def words_between(shortest: int, longest: int) -> tuple[str, ...]:
    """The built-in English words of `shortest` to `longest` letters, in order."""
    text = resources.files("lorascope.tasks").joinpath("words.txt").read_text("utf-8")
    return tuple(word for word in text.split() if shortest <= len(word) <= longest)


def make_letters(rng: random.Random, difficulty: int) -> Draft:
    """How often one letter appears in a word (or, from difficulty 4 on, in a phrase)."""
    known = words_between(*_LENGTHS[difficulty])
    words = [rng.choice(known) for _ in range(_WORDS_ASKED[difficulty])]
    text = " ".join(words)
    letter = _draw_letter(rng, text.replace(" ", ""))
    gold = text.count(letter)
    teller = Teller(rng)
    _tell(teller, words, letter)
    quote = rng.choice(('"', "'", '"', ""))
    shown = f"{quote}{text}{quote}" if len(words) == 1 else f'"{text}"'
    letter_shown = rng.choice((f'"{letter}"', f"'{letter}'", letter)) if quote else f"'{letter}'"
    own = (
        "[There are|I count|I find] {gold}.",
        f"[The letter |]{letter} [appears|occurs|is there] {{gold}} time{'s' if gold != 1 else ''}.",
    )
    return Draft(
        question=vary(rng, _ASK, {"l": letter_shown, "w": shown}),
        gold=str(gold),
        key=f"letters {text} {letter}",
        group=f"letters {text}",
        thinking=teller.text(),
        answer=say_answer(rng, gold, own),
        slips=tuple(teller.slips),
        meta={"word": text, "letter": letter},
    )


def _draw_letter(rng: random.Random, letters: str) -> str:
    """Often a repeated letter, else any letter of the word; in 12% of problems one that is not in it."""
    absent = [c for c in "aeiorstlncdmpgu" if c not in letters]
    if absent and rng.random() < 0.12:
        return rng.choice(absent)
    repeated = sorted({c for c in letters if letters.count(c) > 1})
    if repeated and rng.random() < 0.6:
        return rng.choice(repeated)
    return rng.choice(sorted(set(letters)))


def _spell(word: str, letter: str, style: str, start: int = 0) -> str:
    """The letters of a word, its hits numbered on from `start` in one of the styles."""
    separator = ", " if "," in style else "-" if "-" in style else " "
    if "(" not in style:
        return separator.join(word)
    spelled: list[str] = []
    for c in word:
        start += c == letter
        spelled.append(f"{c} ({start})" if c == letter else c)
    return separator.join(spelled)


def _tell(teller: Teller, words: list[str], letter: str) -> None:
    rng = teller.rng
    style = rng.choice((",", " ", "-", ",(", " (", ",("))
    hits = 0
    for index, word in enumerate(words):
        here = word.count(letter)
        right = {"letters": _spell(word, letter, style, hits), "w": word}
        wrong = {**right, "letters": _spell(_misspell(rng, word), letter, style, hits)}
        again = (
            "[it is|the letters are|spelled out it is|I spell|in letters] {letters}.",
            "{letters}.",
            "{w} is spelled {letters}.",
            "it goes {letters}.",
            "again: {letters}.",
        )
        teller.step(_OPEN if len(words) == 1 or index else _OPEN[1:4], right, wrong, again)
        hits += here
        if len(words) > 1:
            teller.say(
                (
                    "[That makes|So far|Now|Up to here] {n}.",
                    "{here} [here|more|in this one], {n} so far.",
                    "[Total|Count|Running count][:|] {n}.",
                    "{l}: {here} here, {n} [in all|now].",
                    "[I have|We have|I am at] {n}[| now| so far].",
                ),
                l=letter,
                n=hits,
                here=here,
            )
    if len(words) > 1:
        return
    if hits and teller.chance(0.25):
        places = [str(i + 1) for i, c in enumerate(words[0]) if c == letter]
        teller.say(
            (
                "[It is at|I see it at|I find it at|It stands at] [place|position|number] {places}.",
                "[Place|Position|Places]: {places}.",
                "[Hits|Found] at {places}.",
                "[At|Number] {places}[, yes|].",
                "[Letter|Letters] {places} [match|fit].",
            ),
            places=" and ".join(places),
        )
    values = {"n": hits, "l": letter, "times": _TIMES.get(hits, f"{hits} times")}
    miscount = hits + 1 if hits == 0 or teller.chance(0.5) else hits - 1
    wrongly = {"n": miscount, "l": letter, "times": _TIMES.get(miscount, f"{miscount} times")}
    again = (
        "[it is|I count|there are|that makes] {n}.",
        "{l} is there {times}.",
        "[only |]{n}.",
        "{l}: {n}.",
        "[the count is|the total is] {n}.",
    )
    teller.step(_COUNT, values, wrongly, again)
    if teller.chance(0.1):
        counted = _spell(words[0], letter, ",(")
        teller.say("[Let me count again|Check|Once more|Again]: {letters}. " + FITS, letters=counted)


def _misspell(rng: random.Random, word: str) -> str:
    """The word with one letter lost or two neighbours exchanged."""
    place = rng.randrange(len(word) - 1)
    if rng.random() < 0.6:
        return word[:place] + word[place + 1 :]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
