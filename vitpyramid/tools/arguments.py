"""Types of arguments that several tools take."""

import argparse
from collections.abc import Callable


def at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for `argparse`: integers of at least `least` and at most `most`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
            expected = f"an integer of at least {least}" + (f" and at most {most}" if most < 2**63 - 1 else "")
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected {expected}")
        return int(text)

    return integer
