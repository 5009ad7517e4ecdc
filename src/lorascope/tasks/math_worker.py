"""The process behind `mathematics.py`: reads [gold, answer] as one JSON line, writes true or false.

It is run as a file, not imported, so that it loads nothing of lorascope but itself.
"""

import json
import logging
import sys


def main() -> None:
    """Answers until its input ends."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = (_wrapped(text) for text in json.loads(line))
        golds = parse(gold, parsing_timeout=None)
        answers = parse(answer, parsing_timeout=None)
        right = verify(golds, answers, timeout_seconds=None)
        print("true" if right else "false", flush=True)


def _wrapped(text: str) -> str:
    """math-verify reads LaTeX only between dollar signs or in a box."""
    return text if "$" in text or "\\boxed" in text or "\\(" in text else f"${text}$"


if __name__ == "__main__":
    main()
