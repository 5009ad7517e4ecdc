"""Reasoning traces: formats in, rendering with segments, batches."""

from lorascope.traces.batches import pad_ids, plan_batches
from lorascope.traces.formats import Trace, load_traces, read_traces, split_thinking, write_traces
from lorascope.traces.rendering import (
    ANSWER,
    MARKUPS,
    PROMPT,
    SEGMENT_NAMES,
    SPECIAL,
    THINK,
    Markup,
    Rendered,
    Renderer,
)

__all__ = [
    "ANSWER",
    "MARKUPS",
    "PROMPT",
    "SEGMENT_NAMES",
    "SPECIAL",
    "THINK",
    "Markup",
    "Rendered",
    "Renderer",
    "Trace",
    "load_traces",
    "pad_ids",
    "plan_batches",
    "read_traces",
    "split_thinking",
    "write_traces",
]
