"""What a run may spend on judges: requests, tokens and money, with a hard stop before the limit and none after it."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

from lorascope.explain.settings import JudgeConfig

MILLION = 1_000_000


class BudgetSpent(Exception):
    """The next request could go over the budget; nothing was sent."""


@dataclass(frozen=True)
class Limits:
    """The most that one run may spend (None: no limit), and prices per million tokens in any currency."""

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0


def limits_of(config: JudgeConfig) -> Limits:
    """The limits and prices that a command's options name."""
    return Limits(config.budget_calls, config.budget_tokens, config.budget_money, config.price_in, config.price_out)


@dataclass
class Spent:
    """Requests sent, tokens read and written by judges, and answers that came from the file instead."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    replayed: int = 0

    def plus(self, calls: int, tokens_in: int, tokens_out: int) -> Spent:
        """These and further ones."""
        return Spent(self.calls + calls, self.tokens_in + tokens_in, self.tokens_out + tokens_out, self.replayed)

    def money(self, limits: Limits) -> float:
        """What the tokens cost at these prices."""
        return (self.tokens_in * limits.price_in + self.tokens_out * limits.price_out) / MILLION


class Budget:
    """Counts what is spent, from any thread. A request in flight counts at the most that it can cost.

    So the limits are never exceeded; a request that would only fit if those in flight turn out cheaper waits for them.
    """

    def __init__(self, limits: Limits) -> None:
        """Start with nothing spent."""
        self.limits = limits
        self.spent = Spent()
        self._flying = Spent()
        self._changed = threading.Condition()

    def reserve(self, tokens_in: int, tokens_out: int) -> None:
        """Wait until a request of at most so many tokens fits.

        Raises:
            BudgetSpent: it does not fit although nothing is in flight.
        """
        with self._changed:
            while not self._fits(tokens_in, tokens_out):
                if self._flying.calls == 0:
                    raise BudgetSpent
                self._changed.wait()
            self._flying = self._flying.plus(1, tokens_in, tokens_out)

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace what was reserved for a request (tokens in and out) by what it used."""
        with self._changed:
            self._flying = self._flying.plus(-1, -reserved[0], -reserved[1])
            self.spent = self.spent.plus(1, *used)
            self._changed.notify_all()

    def count_replayed(self) -> None:
        """Count an answer that was in the file already."""
        with self._changed:
            self.spent.replayed += 1

    def _fits(self, tokens_in: int, tokens_out: int) -> bool:
        flying, limits = self._flying, self.limits
        most = self.spent.plus(flying.calls + 1, flying.tokens_in + tokens_in, flying.tokens_out + tokens_out)
        return (
            (limits.calls is None or most.calls <= limits.calls)
            and (limits.tokens is None or most.tokens_in + most.tokens_out <= limits.tokens)
            and (limits.money is None or most.money(limits) <= limits.money)
        )


def account(budget: Budget) -> dict[str, Any]:
    """What was spent so far: requests, tokens, money, and answers that were in the file."""
    return asdict(budget.spent) | {"money": round(budget.spent.money(budget.limits), 6)}


def say_spent(spent: dict[str, Any]) -> str:
    """An `account` in words."""
    return f"{spent['calls']} requests, {spent['tokens_in'] + spent['tokens_out']} tokens, {spent['money']:.4g} money"
