"""Steering: text from the adapted model while features are pushed, scaled, clamped or switched off.

`steer_stream` is the engine, one token at a time (for the studio and for code); `steer_text` is the command.
"""

from lorascope.steering.moves import MODES, Steer
from lorascope.steering.panel import Panel, open_panel
from lorascope.steering.passes import TARGETS
from lorascope.steering.stage import SteerConfig, steer_text
from lorascope.steering.stream import Bench, StreamedToken, open_bench, refreshed, steer_stream

__all__ = [
    "MODES",
    "TARGETS",
    "Bench",
    "Panel",
    "Steer",
    "SteerConfig",
    "StreamedToken",
    "open_bench",
    "open_panel",
    "refreshed",
    "steer_stream",
    "steer_text",
]
