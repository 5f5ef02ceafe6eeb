"""What values a config key may have: pairs of a function and, for messages, what it expects."""

import re
from collections.abc import Callable

Rule = tuple[Callable, str]

POSITIVE: Rule = (lambda v: v > 0, "more than 0")
AT_LEAST_ONE: Rule = (lambda v: v >= 1, "at least 1")
NOT_NEGATIVE: Rule = (lambda v: v >= 0, "0 or more")
FRACTION: Rule = (lambda v: 0 <= v < 1, "at least 0 and less than 1")
PROBABILITY: Rule = (lambda v: 0 <= v <= 1, "between 0 and 1")
SHARE: Rule = (lambda v: 0 < v <= 1, "more than 0 and at most 1")


def one_of(*values: str) -> Rule:
    """Just these strings."""
    return (lambda v: v in values), "one of " + ", ".join(map(repr, values))


def are_patterns(pairs: list) -> bool:
    """Whether these are pairs of a regular expression and a factor of 0 or more."""
    try:
        return all(re.compile(pattern) and factor >= 0 for pattern, factor in pairs)
    except (ValueError, re.error):  # not pairs; no regular expression
        return False
