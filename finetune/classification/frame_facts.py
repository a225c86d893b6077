"""Rules for a clip's frames as plain facts of an exported graph, and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pretrain.errors import WeightsError
from pretrain.samples.frame_choice import DenseChoice, FrameChoice, SparseChoice, StridedChoice
from pretrain.samples.motion_choice import MotionChoice
from pretrain.samples.segments import DenseSegmentChoice, SegmentChoice

KINDS = (DenseChoice, SparseChoice, StridedChoice, SegmentChoice, DenseSegmentChoice, MotionChoice)
RULES: dict[str, Any] = {rule.name: rule for rule in KINDS}
#: Names of the values that rules are made of.
VALUES = tuple(sorted({field.name for rule in RULES.values() for field in fields(rule)}))


def facts_of(choice: FrameChoice) -> dict[str, Any]:
    """Write a rule down: its name as `sampling`, and its values."""
    made: Any = choice
    return {"sampling": choice.name} | asdict(made)


def choice_of(facts: Mapping[str, Any], where: str) -> FrameChoice:
    """Make the rule of a graph.

    Args:
        facts: of the graph.
        where: it lies, for messages.

    Raises:
        WeightsError: the rule is not known here, or lacks a value.
    """
    # Files of before there were rules with other values say the length in `clip` alone.
    known = {"frames": facts["clip"][0], **facts}
    if facts["sampling"] not in RULES:
        rules = ", ".join(RULES)
        raise WeightsError(f"{where}: frames are chosen by {facts['sampling']!r}, allowed: {rules}; export it again")
    rule = RULES[facts["sampling"]]
    if missing := [field.name for field in fields(rule) if field.name not in known]:
        raise WeightsError(f"{where}: says nothing of {', '.join(missing)}; write it again with launch/export.py")
    choice: FrameChoice = rule(**{field.name: known[field.name] for field in fields(rule)})
    return choice
