"""Reading the answer out of a response and comparing it, with the same leniency for every model.

The rules, in order; no rule looks at which model wrote the response:

1. What counts is the text after the last marker that closes the thinking (</think>, s1's answer marker). Without
   one it is the whole response. A thinking that was opened and never closed is unfinished: then only an answer that
   is stated (rule 2) counts, not the last number at which it happened to be cut (rule 3).
2. A stated answer: the last boxed expression, else the last "answer is X", "Answer: X" or "#### X".
3. Otherwise what stands last: the last number, list, letter in parentheses, or words after "is", ":" or "=".

Nothing found is None: unparsed, counted as wrong and shown as such.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from lorascope.tasks.gym import PREFIX, score_gym
from lorascope.tasks.mathematics import same_mathematics
from lorascope.tasks.problem import Problem, Score
from lorascope.traces import MARKUPS

_CLOSERS = tuple({markup.close.strip() for markup in MARKUPS.values()} | {"</thinking>"})
_OPENERS = tuple({markup.open.strip() for markup in MARKUPS.values()} | {"<thinking>"})
_SPECIAL = re.compile(r"<\|[^<>|]*\|>|</s>|<eos>")

_NUMBER = re.compile(r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+(?![\d/]))?|(?<=[a-zA-Z(])\d+(?:\.\d+)?")
_STATED = re.compile(
    r"(?:answer|solution|result)\b[^\n.:=]{0,40}?(?:\bis\b|\bare\b|:|=)\s*:?\s*|####\s*|\banswer\s*\n+\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_OPERATOR_NEXT = re.compile(r"\s*(?:[+*/×÷^=·-]\s*\(?\d|=|\s[x]\s*\d)")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_AS_NUMBER = {
    **{word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())},
    "once": "1",
    "twice": "2",
    "thrice": "3",
}
_WORD_NUMBER = re.compile(rf"\b(?:{'|'.join(_AS_NUMBER)})\b", re.IGNORECASE)
_FILLERS = "the a an is are state output outputs word string sequence final in it as"


def score(problem: Problem, response: str) -> Score:
    """Reads the answer to `problem` out of a model's response and says whether it is right."""
    text, finished = after_thinking(response)
    stated = find_stated(text)
    match problem.kind:
        case "number":
            extracted = _read_number(text, stated, finished)
            right = extracted is not None and same_number(extracted, problem.gold)
        case "list":
            extracted = _read_list(text, stated, finished)
            right = extracted is not None and same_list(extracted, problem.gold)
        case "choice":
            extracted = _read_choice(text, stated, finished, problem.options)
            right = extracted is not None and extracted == problem.gold.strip("() .").upper()
        case "roles":
            extracted = read_roles(text, problem.gold) if finished or stated is not None else None
            right = extracted is not None and extracted == read_roles(problem.gold, problem.gold)
        case "math":
            extracted = _read_math(text, stated, finished)
            right = extracted is not None and same_mathematics(problem.gold, extracted)
        case "text":
            extracted = _read_text(text, stated, finished)
            right = extracted is not None and same_text(extracted, problem.gold)
    if problem.family.startswith(PREFIX):
        return score_gym(problem, extracted)
    return Score(right, extracted)


def after_thinking(response: str) -> tuple[str, bool]:
    """The part of a response that answers, and whether its thinking, if there is any, was finished."""
    end, closer = max(((response.rfind(closer), closer) for closer in _CLOSERS), key=lambda found: found[0])
    if end >= 0:
        return _SPECIAL.sub("", response[end + len(closer) :]).strip(), True
    finished = not any(opener in response for opener in _OPENERS)
    return _SPECIAL.sub("", response).strip(), finished


def find_stated(text: str) -> str | None:
    """The last boxed expression, else the rest of the sentence after the last "answer is" and the like."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    stated = list(_STATED.finditer(text))
    if not stated:
        return None
    rest = text[stated[-1].end() :].lstrip("*_` \n:")
    end = _SENTENCE_END.search(rest)
    phrase = (rest[: end.start()] if end else rest).strip()
    return phrase or None


def last_boxed(text: str) -> str | None:
    r"""The inside of the last complete \boxed{...} or \fbox{...}, braces balanced."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed?\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip() or None
    return None


def plain(text: str) -> str:
    """Takes the typesetting off: dollar signs, LaTeX spaces and text commands, fractions as a/b, markdown stars."""
    text = text.replace("−", "-").replace("–", "-").replace("{,}", ",")
    text = re.sub(r"\\(?:text|mathrm|mathbf|boxed|textbf|fbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:times|cdot)", "*", text)
    text = re.sub(r"\\[,!;: ()\[\]]|\\(?:left|right|quad)", "", text)
    text = re.sub(r"\\?[$€£%]|[*]{2}|`", "", text)
    return re.sub(r"(?<=\d),\s?(?=\d{3}(?:\D|$))(?<![,\s]\d{1},)", ",", text)


# -- numbers ----------------------------------------------------------------------------------------------------


def _read_number(text: str, stated: str | None, finished: bool) -> str | None:
    if stated is not None:
        found = _number_in_phrase(plain(stated))
        if found is not None:
            return found
    if not finished:
        return None
    clean = plain(text)
    numbers = _NUMBER.findall(clean)
    if numbers:
        return _tidy(numbers[-1])
    words = _WORD_NUMBER.findall(clean)
    return _AS_NUMBER[words[-1].lower()] if words else None


def _number_in_phrase(phrase: str) -> str | None:
    """The first number, unless it starts a calculation: then the one after the last equals sign."""
    found = _NUMBER.search(phrase)
    if found is None:
        word = _WORD_NUMBER.search(phrase)
        return _AS_NUMBER[word[0].lower()] if word else None
    equals = phrase.rfind("=")
    begins = not re.search(r"[A-Za-z0-9]\s", phrase[: found.start()])
    if equals >= 0 and (_OPERATOR_NEXT.match(phrase, found.end()) or not begins):
        after = _NUMBER.search(phrase, equals + 1)
        return _tidy(after[0]) if after else _tidy(found[0])
    return _tidy(found[0])


def _tidy(number: str) -> str:
    return number.replace(",", "")


_THOUSANDS = re.compile(r"[^,]*|[^\d,]*\d{1,3}(?:,\d{3})+(?!\d)[^,]*")
"""Text whose commas, if any, set thousands apart."""


def as_fraction(text: str) -> Fraction | None:
    """The exact value of "1,234", "-0.5" or "3/4"; None for anything else, such as "3, 5" or "42_5"."""
    given = text.replace("{,}", ",")
    if re.search(r"_|\d\s+\d|,\s|,\s*-", given) or not _THOUSANDS.fullmatch(plain(given)):
        return None
    try:
        return Fraction(plain(text).replace(",", "").replace(" ", "").rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def same_number(one: str, other: str) -> bool:
    """Equal as numbers: 42, 42.0 and 84/2 are the same."""
    value = as_fraction(one)
    return value is not None and value == as_fraction(other)


# -- lists ------------------------------------------------------------------------------------------------------

_BULLET = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+(\S+)\s*$")


def _items(text: str) -> list[str]:
    """The numbers of a text, or when there are none its words, in order."""
    clean = re.sub(r",(?=\d{3}\b)", ", ", plain(text))
    numbers = [_tidy(number) for number in _NUMBER.findall(clean)]
    return numbers or [word.lower() for word in re.findall(r"[^\W\d_]+", clean) if word.lower() != "and"]


def _read_list(text: str, stated: str | None, finished: bool) -> str | None:
    if stated is not None and len(items := _items(stated)) > 1:
        return ", ".join(items)
    if not finished:
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    bullets: list[str] = []
    for line in reversed(lines):
        if found := _BULLET.match(line):
            bullets.insert(0, found[1])
        elif bullets:
            break
    if len(bullets) > 1:
        return ", ".join(_items(", ".join(bullets)))
    for line in reversed(lines):
        tail = re.split(r":|=|\bis\b|\bare\b", line.rstrip(" :"))[-1]
        items = [_tidy(number) for number in _NUMBER.findall(re.sub(r",(?=\d{3}\b)", ", ", plain(tail)))]
        if len(items) > 1:
            return ", ".join(items)
    return None


def same_list(one: str, other: str) -> bool:
    """The same items in the same order."""
    ours, theirs = _items(one), _items(other)
    return len(ours) == len(theirs) and all(a == b or same_number(a, b) for a, b in zip(ours, theirs, strict=True))


# -- choices ----------------------------------------------------------------------------------------------------

_LETTER_STATED = re.compile(r"^\W*(?:(?:option|choice|letter)\W+)?([A-Ja-j])(?![\w'])", re.IGNORECASE)
_LETTER_LOOSE = re.compile(
    r"\(([A-J])\)|(?:option|choice)\s+\(?([A-J])\b|^\W*([A-J])(?:[.):]|\W*$)|\b([A-J])\W*$", re.MULTILINE
)


def _read_choice(text: str, stated: str | None, finished: bool, options: tuple[str, ...]) -> str | None:
    allowed = "ABCDEFGHIJ"[: len(options) or 10]
    if stated is not None:
        phrase = plain(stated)
        restated = [i for i, option in enumerate(options) if _squeeze(option) == _squeeze(phrase)]
        if len(restated) == 1:
            return allowed[restated[0]]
        found = _LETTER_STATED.match(phrase) or _LETTER_LOOSE.search(phrase)
        letter = next((group for group in found.groups() if group), "").upper() if found else ""
        if letter and letter in allowed:
            return letter
    if not finished:
        return None
    letters = ["".join(groups) for groups in _LETTER_LOOSE.findall(plain(text))]
    letters = [letter for letter in letters if letter in allowed]
    return letters[-1] if letters else None


# -- who is a knight --------------------------------------------------------------------------------------------

_ROLE = re.compile(r"\b(knight|knave|liar|truth[- ]teller)s?\b", re.IGNORECASE)


def read_roles(text: str, gold: str) -> str | None:
    """Each person's role as last said: "Ann is a knight, Bob is a knave"; None unless all have one.

    The persons are those that `gold` names. "Ann and Bob are knights", "Ann: knave" and "both are knaves" count.
    """
    names = [name for name in dict.fromkeys(re.findall(r"\b[A-Z]\w+", gold)) if not _ROLE.match(name)]
    roles: dict[str, str] = {}
    for clause in re.split(r"[.,;\n]|\bbut\b|\bwhile\b|(?<=knight)\s+and\b|(?<=knave)\s+and\b", plain(text)):
        said = _ROLE.search(clause)
        if not said or re.search(r"\b(?:not|says|said|if|n't)\b", clause[: said.start()]):
            continue
        role = "knight" if said[1].lower().startswith(("knight", "truth")) else "knave"
        everyone = re.search(r"\b(?:both|all|everyone|all of them)\b", clause, re.IGNORECASE)
        mentioned = [name for name in names if re.search(rf"\b{re.escape(name)}\b", clause)]
        for name in mentioned or (names if everyone else []):
            roles[name] = role
    if not names or set(roles) != set(names):
        return None
    return ", ".join(f"{name} is a {roles[name]}" for name in names)


# -- mathematics and text ---------------------------------------------------------------------------------------


def _read_math(text: str, stated: str | None, finished: bool) -> str | None:
    if stated is not None:
        return stated
    if not finished or not text:
        return None
    formulas = re.findall(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.DOTALL)
    if formulas:
        return "".join(formulas[-1]).strip()
    numbers = _NUMBER.findall(plain(text))
    return _tidy(numbers[-1]) if numbers else None


_LOOSE_TEXT = re.compile(r"(?:\bis\b|\bare\b|:|=|->|→|\boutputs?\b|\bgives\b|\bget\b|\bin\b)\s*([^.\n:=]+)")


def _squeeze(text: str) -> str:
    # A plus is more than punctuation: blood of type A+, Na+, C++.
    return re.sub(r"[^\w+]+|_", "", _unaccented(plain(text))).casefold()


def _without_fillers(text: str) -> str:
    return " ".join(word for word in re.split(r"\s+", plain(text)) if _squeeze(word) not in _FILLERS.split())


def _read_text(text: str, stated: str | None, finished: bool) -> str | None:
    if stated is not None and _squeeze(stated):
        return plain(stated).strip(" .\"'")
    if not finished:
        return None
    lines = [line for line in text.splitlines() if _squeeze(line)]
    if not lines:
        return None
    loose = [found for found in _LOOSE_TEXT.findall(lines[-1]) if _squeeze(found)]
    return plain(loose[-1] if loose else lines[-1]).strip(" .\"'")


def same_text(one: str, other: str) -> bool:
    """Equal but for case, accents, spaces, punctuation, words such as "the" or "state", and a little around it.

    "Mount Everest" is Everest: a gold answer of three letters or more may stand among at most three more words,
    unless the answer hedges with "or" or "not".
    """
    if _squeeze(one) == _squeeze(other):
        return True
    if not _squeeze(other):
        return False
    if _squeeze(_without_fillers(one)) == _squeeze(_without_fillers(other)):
        return True
    said, gold = _words(one), _words(other)
    if len("".join(gold)) < 3 or len(said) > len(gold) + 3 or {"or", "not"} & set(said):
        return False
    return any(said[i : i + len(gold)] == gold for i in range(len(said)))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", _unaccented(plain(text)).casefold())


def _unaccented(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
