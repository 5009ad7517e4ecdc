"""A taxonomy: categories with subcategories, read from a YAML file, and how far each of its entries owns a word.

Shapes: V = words of a vocabulary, S = subcategories.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lorascope.errors import BadInput
from lorascope.explain.rules import CLASSES, token_classes
from lorascope.traces import SEGMENT_NAMES

FloatArray = NDArray[np.float64]
FIELDS = ("words", "patterns", "classes", "segments")
EXAMPLE_LENGTH = 200
"""Most characters of an example: each stands in every question to a judge."""
DESCRIBED = 0.5
"""What a word of a name or description counts, against 1 of a listed word."""
CLASS, SEGMENT = "class:", "segment:"
"""What stands before the name of a token class or a segment where a word is expected."""
STOP_WORDS = frozenset(
    {
        *("a", "an", "the", "of", "and", "or", "in", "on", "at", "to", "from", "by", "with", "for", "as", "is", "are"),
        *("it", "its", "that", "this", "what", "which", "how", "they", "them", "their", "not", "whatever", "because"),
        *("one", "other", "another", "into", "whose", "who", "where", "there", "may", "be", "has", "have"),
    }
)


@dataclass(frozen=True)
class Subcategory:
    """One entry: its category's name, its own name, and what belongs to it."""

    category: str
    name: str
    description: str
    words: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    classes: frozenset[str]
    segments: frozenset[str]
    described: frozenset[str]
    """Words of the two names and of the descriptions."""
    examples: tuple[str, ...] = ()
    """What a judge is shown of it; words do not count them."""


@dataclass(frozen=True)
class Taxonomy:
    """Categories in their order, each with its description, and all subcategories in order."""

    name: str
    descriptions: dict[str, str]
    subcategories: tuple[Subcategory, ...]
    examples: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Examples of whole categories, for those that have any."""

    @property
    def categories(self) -> list[str]:
        """Names of the categories."""
        return list(self.descriptions)

    @property
    def category_of_S(self) -> NDArray[np.int64]:
        """Number of each subcategory's category, int64 [S]."""
        names = self.categories
        return np.array([names.index(sub.category) for sub in self.subcategories], np.int64)

    def find(self, answer: str) -> tuple[str, str | None] | None:
        """(category, subcategory or None) that a judge's answer names, in any case; None when there is no such name.

        `category`, `subcategory` and `category / subcategory` are understood.
        """
        said = [part.strip().casefold() for part in answer.split("/")]
        for name in self.categories:
            if said == [name.casefold()]:
                return name, None
        for sub in self.subcategories:
            if said in ([sub.name.casefold()], [sub.category.casefold(), sub.name.casefold()]):
                return sub.category, sub.name
        return None


def load_taxonomy(path: str | None) -> Taxonomy:
    """The taxonomy of a YAML file, the package's own without a path.

    Raises:
        BadInput: the file cannot be read, or says something that is no taxonomy; the sentence names the place.
    """
    if path is None:
        text = (resources.files("lorascope.explain.categories") / "taxonomy.yaml").read_text(encoding="utf-8")
        return parse_taxonomy(text, "the built-in taxonomy")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"Cannot read the taxonomy {path}: {error}.") from error
    return parse_taxonomy(text, path)


def parse_taxonomy(text: str, place: str) -> Taxonomy:
    """The taxonomy that a YAML text describes; `place` is what errors call it. Raises BadInput."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"Cannot read {place} as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("categories"), list) or not data["categories"]:
        raise BadInput(f"{place} must hold a mapping with a list of `categories`.")
    _known_keys(data, {"name", "description", "categories"}, f"{place} has")
    descriptions: dict[str, str] = {}
    examples: dict[str, tuple[str, ...]] = {}
    subcategories: list[Subcategory] = []
    for entry in data["categories"]:
        name = _name(entry, place, "a category")
        if name in descriptions:
            raise BadInput(f"{place} has the category {name!r} twice.")
        _known_keys(entry, {"name", "description", "examples", "subcategories"}, f"{place}: the category {name!r} has")
        descriptions[name] = _text(entry, "description", place, name)
        if shown := _examples(entry, place, name):
            examples[name] = shown
        inner = entry.get("subcategories")
        if not isinstance(inner, list) or not inner:
            raise BadInput(f"{place}: the category {name!r} needs a list of `subcategories`.")
        made = [_subcategory(one, name, descriptions[name], place) for one in inner]
        if len({one.name for one in made}) < len(made):
            raise BadInput(f"{place}: the category {name!r} has two subcategories of one name.")
        subcategories += made
    return Taxonomy(str(data.get("name", "taxonomy")), descriptions, tuple(subcategories), examples)


def _subcategory(entry: Any, category: str, category_description: str, place: str) -> Subcategory:
    name = _name(entry, place, f"a subcategory of {category!r}")
    where = f"{category} / {name}"
    _known_keys(entry, {"name", "description", "examples", *FIELDS}, f"{place}: {where} has")
    lists = {key: _strings(entry, key, place, where) for key in FIELDS}
    for key, known in (("classes", tuple(CLASSES)), ("segments", SEGMENT_NAMES)):
        if wrong := [value for value in lists[key] if value not in known]:
            raise BadInput(f"{place}: {where} names {wrong[0]!r} under {key}; known are {', '.join(known)}.")
    try:
        patterns = tuple(re.compile(pattern) for pattern in lists["patterns"])
    except re.error as error:
        raise BadInput(f"{place}: {where} has a pattern that is no regular expression ({error}).") from error
    description = _text(entry, "description", place, where)
    described = frozenset(split_words(" ".join([category, category_description, name, description]))) - STOP_WORDS
    words = frozenset(normal_word(word) for word in lists["words"])
    return Subcategory(
        category,
        name,
        description,
        words,
        patterns,
        frozenset(lists["classes"]),
        frozenset(lists["segments"]),
        described,
        _examples(entry, place, where),
    )


def _known_keys(entry: dict[Any, Any], known: set[str], whose: str) -> None:
    if unknown := set(entry) - known:
        raise BadInput(f"{whose} an unknown key {sorted(map(str, unknown))[0]!r}.")


def _examples(entry: dict[str, Any], place: str, where: str) -> tuple[str, ...]:
    shown = tuple(" ".join(text.split()) for text in _strings(entry, "examples", place, where))
    for text in shown:
        if not text or len(text) > EXAMPLE_LENGTH:
            raise BadInput(f"{place}: an example of {where} must be a short text of 1 to {EXAMPLE_LENGTH} characters.")
    return shown


def _name(entry: Any, place: str, what: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
        raise BadInput(f"{place}: {what} has no `name`.")
    return str(entry["name"]).strip()


def _text(entry: dict[str, Any], key: str, place: str, where: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str):
        raise BadInput(f"{place}: the {key} of {where} must be a text.")
    return value


def _strings(entry: dict[str, Any], field: str, place: str, where: str) -> list[str]:
    values = entry.get(field, [])
    if not isinstance(values, list):
        raise BadInput(f"{place}: {field} of {where} must be a list.")
    for value in values:
        if not isinstance(value, str):  # YAML reads a bare no, yes, 1 as something else
            raise BadInput(f"{place}: {field} of {where} holds {value!r}, which must be put in quotes to be a text.")
    return values


def normal_word(text: str) -> str:
    """A token's text as words are compared: lower case, without spaces around it; white space as `\\n` or one space."""
    core = text.strip(" \t").casefold()
    if core:
        return core
    return " " if text else ""


def split_words(text: str) -> list[str]:
    """The words of a sentence in lower case; other signs are left out."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+", text.casefold())


def membership(texts: Sequence[str], taxonomy: Taxonomy) -> FloatArray:
    """How far each text belongs to each subcategory, float64 [V, S]; a row sums to at most 1.

    A text is a token's, or `class:NAME`, `segment:NAME` for what a rule says of a token. A listed word (or pattern)
    counts 1, shared among the subcategories that list it; where there is none, the token's classes count 1 in the same
    way; where there is none, words of names and descriptions count `DESCRIBED`.
    """
    member_VS = np.zeros((len(texts), len(taxonomy.subcategories)))
    for row, text in enumerate(texts):
        word, classes = normal_word(text), frozenset(token_classes(text))
        segments: frozenset[str] = frozenset()
        if text.startswith(CLASS):
            classes = frozenset({text.removeprefix(CLASS)})
        elif text.startswith(SEGMENT):
            classes, segments = segments, frozenset({text.removeprefix(SEGMENT)})
        subs = taxonomy.subcategories
        listed = [word in sub.words or any(pattern.fullmatch(word) for pattern in sub.patterns) for sub in subs]
        classed = [not (sub.classes.isdisjoint(classes) and sub.segments.isdisjoint(segments)) for sub in subs]
        described = [word in sub.described for sub in subs]
        for owners, worth in ((listed, 1.0), (classed, 1.0), (described, DESCRIBED)):
            if any(owners):
                member_VS[row, owners] = worth / sum(owners)
                break
    return member_VS
