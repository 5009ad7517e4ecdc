"""Which features fire at reasoning words, without a judge: a score with a null for all, and a contrast for one word."""

from lorascope.reasoning.contrast import ContrastSettings, contrast_word
from lorascope.reasoning.stage import ReasoningConfig, find_reasoning
from lorascope.reasoning.words import WordMarks, mark_words, read_words

__all__ = [
    "ContrastSettings",
    "ReasoningConfig",
    "WordMarks",
    "contrast_word",
    "find_reasoning",
    "mark_words",
    "read_words",
]
