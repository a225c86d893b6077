"""Types of options that several commands have."""

import argparse

from pretrain.data.pack.pack_plan import Part


def whole(text: str) -> int:
    """Read a number of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive(text: str) -> int:
    """Read a number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return value


def part_of(text: str) -> Part:
    """Read I/N, a part of a job array."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, e.g. 0/8")
    return Part(int(index), int(count))
