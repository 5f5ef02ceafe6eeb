"""What values a config key may have."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """A rule of a key.

    Attributes:
      allows: whether a value of the key's type may stand there.
      expected: the same in words, for messages.
      high: the largest number, of a range.
    """

    allows: Callable
    expected: str
    high: float = 0

    def holds(self, value) -> bool:
        """Whether the key may have this value, of whatever type."""
        try:
            return bool(self.allows(value))
        except (TypeError, ValueError):  # tuples of something else; a text that cannot be parsed
            return False


def between(low: float, high: float, above: bool = False, below: bool = False) -> Rule:
    """Numbers from `low` to `high`, both finite; without `low` where `above`, without `high` where `below`."""

    def allows(value) -> bool:
        return low <= value <= high and not (above and value == low) and not (below and value == high)

    start, end = "more than" if above else "at least", "less than" if below else "at most"
    return Rule(allows, f"{start} {low:,} and {end} {high:,}", high)


BATCH = between(1, 2**20)
EPOCHS = between(0, 100_000, above=True)
FRACTION = between(0, 1, below=True)
PROBABILITY = between(0, 1)
SHARE = between(0, 1, above=True)


def interval(low: float, high: float) -> Rule:
    """Pairs of numbers in this range, the smaller one first."""
    words = f"(low, high) with {low} <= low <= high <= {high}"
    return Rule(lambda v: len(v) == 2 and low <= v[0] <= v[1] <= high, words)


def channels(rule: Rule) -> Rule:
    """A number for each of three channels, or none."""
    return Rule(lambda v: len(v) in (0, 3) and all(map(rule.holds, v)), f"three numbers, each {rule.expected}, or none")


def one_of(*values: str) -> Rule:
    """Just these strings."""
    return Rule(lambda v: v in values, "one of " + ", ".join(map(repr, values)))


def are_patterns(rule: Rule) -> Rule:
    """Pairs of a regular expression and a factor."""

    def allows(pairs: list) -> bool:
        try:
            return all(re.compile(pattern) and rule.holds(factor) for pattern, factor in pairs)
        except re.error:
            return False

    return Rule(allows, f"(pattern, factor) pairs with a regular expression and a factor of {rule.expected}")
