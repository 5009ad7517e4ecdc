"""Simulating a small Mealy machine step by step (after TempoBench)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lorascope.tasks.problem import Draft
from lorascope.tasks.wording import CHECK, FIRST, FITS, LEAD, Teller, vary

# (states, input symbols, output symbols, shortest and longest input)
_SIZES = {1: (2, 2, 2, 3, 4), 2: (3, 2, 2, 4, 5), 3: (3, 2, 3, 6, 7), 4: (4, 3, 3, 8, 9), 5: (6, 3, 3, 12, 14)}
_STATE_NAMES = ("ABCDEF", "PQRSTU", ("S0", "S1", "S2", "S3", "S4", "S5"), ("q0", "q1", "q2", "q3", "q4", "q5"))
_INPUT_NAMES = ("abc", "xyz", "uvw")
_OUTPUT_NAMES = ("012", "012", "rgb", "mno")


@dataclass(frozen=True)
class Machine:
    """`table[state, symbol]` = (next state, output), all as indices; state 0 is the start."""

    table: dict[tuple[int, int], tuple[int, int]]

    def run(self, word: list[int]) -> list[tuple[int, int]]:
        """The (state reached, output) of each step."""
        state, steps = 0, []
        for symbol in word:
            state, output = self.table[state, symbol]
            steps.append((state, output))
        return steps


_RULES = (
    "({s}, {i}) -> ({t}, {o})",
    "{s} on {i} goes to {t} and outputs {o}",
    "in {s}, {i} leads to {t} with output {o}",
    "{s}, {i}: {t}, {o}",
    "{s} --{i}/{o}--> {t}",
    "from {s} reading {i}: write {o}, go to {t}",
)
_ASK_OUTPUT = (
    "What does it output for [the input |]{w}?",
    "[What is|Give|Find] the output [word |]for [the input |]{w}[?|.]",
    "It reads {w}. What does it [write|output]?",
    "The input is {w}; what is the output?",
    "Which output does {w} give?",
)
_ASK_STATE = (
    "In which state is it after [the input |]{w}?",
    "[What is|Give|Find] the final state for [the input |]{w}[?|.]",
    "It reads {w}. Where does it end?",
    "The input is {w}; what is the last state?",
    "Which state does {w} lead to?",
)
_PREFACE = (
    "A [Mealy machine|machine] starts in [state |]{start}. {rules}.",
    "[Take|Consider] this [Mealy machine|machine], which starts in {start}: {rules}.",
    "[Mealy machine|Machine] with start state {start}: {rules}.",
    "[The rules|The transitions] of a machine are: {rules}. It starts in {start}.",
    "{rules}. The start state is {start}.",
)
_STEP = (
    LEAD + "{s}, {i}: {t}, {o}.",
    LEAD + "{s} on {i} [goes to|leads to|gives] {t}, [output|out|writes] {o}.",
    "{i}: {s} to {t}, {o}.",
    "[Read|Reading|I read] {i}[ in {s}|]: {t}, {o}.",
    "({s}, {i}) [gives|is|->] ({t}, {o}).",
    "{s} -{i}-> {t}, [write|out] {o}.",
)
_CORRECTED = (
    "{s} on {i} [goes to|leads to] {t} [with|and writes] {o}.",
    "({s}, {i}) is ({t}, {o}).",
    "[it is|the rule says|the table says] {t}, {o}.",
    "{i} in {s} [means|gives] {t}, {o}.",
    "{s}, {i}: {t}, {o}.",
)
_SAY = (
    "[The|So the|My|The final] answer is {gold}.",
    "[Answer|Final answer]: {gold}",
    "[The|So the] {what} is {gold}.",
    "[The|So the] answer is \\boxed{{{gold}}}.",
    "The answer is **{gold}**.",
    "[So|Therefore|Thus], the {what} is {gold}.",
)


def make_mealy(rng: random.Random, difficulty: int) -> Draft:
    """A random transition table and input word; asked for the output word or the last state."""
    n_states, n_inputs, n_outputs, shortest, longest = _SIZES[difficulty]
    machine, word = _draw_run(rng, n_states, n_inputs, n_outputs, rng.randint(shortest, longest))
    states = rng.choice(_STATE_NAMES)
    inputs, outputs = rng.choice(_INPUT_NAMES), rng.choice(_OUTPUT_NAMES)
    steps = machine.run(word)
    written = "".join(outputs[o] for _, o in steps)
    wants_output = rng.random() < 0.65
    gold = written if wants_output else states[steps[-1][0]]
    teller = Teller(rng)
    _tell(teller, machine, word, states, inputs, outputs)
    _tell_end(teller, written, states[steps[-1][0]], wants_output)
    content = f"mealy {sorted(machine.table.items())} {word}"
    return Draft(
        question=_ask(rng, machine, states, inputs, outputs, "".join(inputs[i] for i in word), wants_output),
        gold=gold,
        key=f"{content} {'output' if wants_output else 'state'}",
        group=content,
        thinking=teller.text(),
        answer=vary(rng, _SAY, {"gold": gold, "what": "output" if wants_output else "final state"}),
        kind="text",
        slips=tuple(teller.slips),
        meta={"table": [[*k, *v] for k, v in machine.table.items()], "word": word},
    )


def _draw_run(rng: random.Random, states: int, inputs: int, outputs: int, length: int) -> tuple[Machine, list[int]]:
    """A machine and an input on which it changes its state and writes more than one symbol."""
    while True:
        table = {(s, i): (rng.randrange(states), rng.randrange(outputs)) for s in range(states) for i in range(inputs)}
        machine, word = Machine(table), [rng.randrange(inputs) for _ in range(length)]
        steps = machine.run(word)
        if len({s for s, _ in steps} | {0}) > 1 and len({o for _, o in steps}) > 1:
            return machine, word


def _ask(
    rng: random.Random,
    machine: Machine,
    states: str | tuple[str, ...],
    inputs: str,
    outputs: str,
    word: str,
    wants_output: bool,
) -> str:
    rule = rng.choice(_RULES)
    rules = [
        rule.format(s=states[s], i=inputs[i], t=states[t], o=outputs[o]) for (s, i), (t, o) in machine.table.items()
    ]
    preface = vary(rng, _PREFACE, {"start": states[0], "rules": "; ".join(rules)})
    return f"{preface} {vary(rng, _ASK_OUTPUT if wants_output else _ASK_STATE, {'w': word})}"


def _tell(
    teller: Teller, machine: Machine, word: list[int], states: str | tuple[str, ...], inputs: str, outputs: str
) -> None:
    rng = teller.rng
    if teller.chance(0.25):
        teller.say(
            (
                FIRST + "[I start in|it starts in|the start is] {start}.",
                "[Start|Starting] [in|at] {start}.",
                "[Step by step|One symbol at a time|Symbol by symbol].",
                "[I follow|Let me follow] the [rules|table].",
                "[State|Now in] {start}.",
            ),
            start=states[0],
        )
    here = 0
    for symbol in word:
        there, output = machine.table[here, symbol]
        values = {"s": states[here], "i": inputs[symbol], "t": states[there], "o": outputs[output]}
        other = rng.choice([row for row in machine.table.values() if row != (there, output)] or [(there, output)])
        wrong = {**values, "t": states[other[0]], "o": outputs[other[1]]}
        teller.step(_STEP, values, wrong, _CORRECTED)
        here = there


def _tell_end(teller: Teller, written: str, last: str, wants_output: bool) -> None:
    values = {"w": written, "spaced": ", ".join(written), "n": len(written), "last": last}
    if wants_output:
        teller.say(
            (
                "[Together|In order|Joined|The outputs]: {w}.",
                "[So |That is |It wrote |Written: |]{w}.",
                "[The outputs are|I wrote down|Outputs:] {spaced}.",
                "{spaced}[, so {w}|, that is {w}].",
                "[All in all|In one word|As a word][:|,] {w}.",
            ),
            **values,
        )
        if teller.chance(0.1):
            teller.say(
                (CHECK + "{n} symbols[ in and out|]. " + FITS, "[That is|Hmm, that is] {n} symbols. " + FITS), **values
            )
    elif teller.chance(0.6):
        teller.say(
            (
                "[It ends|I end|So it stops|I stop] in {last}.",
                "[Last state|At the end|The end]: {last}.",
                "[So |Then |]{last} is [the end|last|where it stops].",
                "[No input left|The input is over], [state|in] {last}.",
                "[Done|Finished], in {last}.",
            ),
            **values,
        )
