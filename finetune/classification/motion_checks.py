"""Motion curves of labelled sources, looked for before a run that chooses frames by them begins."""

from collections.abc import Sequence

from finetune.classification.views import SourceRules
from finetune.recipe import TuneRecipe
from pretrain.data.fetch import SampleReader
from pretrain.data.index import ShardIndex, load_index
from pretrain.data.members import parse_sample
from pretrain.data.motion_tables import MOTION_ENDING, describe_motion, load_motion_index
from pretrain.errors import DataError
from pretrain.samples.frame_choice import FrameChoice
from pretrain.samples.motion_choice import MotionChoice


def check_motion(name: str, index: ShardIndex, choice: FrameChoice, deadline_s: float) -> str:
    """Compare a data set's curves with what its rule for frames needs.

    Args:
        name: of the source.
        index: its shards, for training or evaluation.
        choice: its rule.
        deadline_s: longest time of one read, seconds.

    Returns:
        a line about the curves, and the videos without; empty where the rule needs none.

    Raises:
        DataError: it has no curves, or such of another measure.
    """
    if not isinstance(choice, MotionChoice):
        return ""
    key, found = f"data.sources.{name}", load_motion_index(index, deadline_s)
    if found is None:
        # Shards of others may hold them; one that has been indexed would say so, so the first sample speaks for all.
        if MOTION_ENDING in parse_sample(SampleReader([index], None, deadline_s, 1).read(0, 0, 0)).files:
            return f"{key}: motion curves are members {MOTION_ENDING} of the samples of {index.url}"
        raise DataError(
            f"{key}.sampling=motion: {index.url} has no motion curves; measure them once: "
            f"python launch/motion_index.py {index.url}, or choose another sampling"
        )
    if found.facts.kind != choice.kind:
        raise DataError(
            f"{key}.sampling=motion: the curves of {index.url} are of kind {found.facts.kind}, input.motion.kind says "
            f"{choice.kind}; change that, or measure again: python launch/motion_index.py {index.url} --kind "
            f"{choice.kind} --again"
        )
    strictly = "; with strict=true those without a curve are bad samples" if choice.strict else ""
    return f"{key}: {describe_motion(found, index.samples)}{strictly}"


def motion_report(recipe: TuneRecipe, rules: Sequence[SourceRules]) -> list[str]:
    """Say of each source that needs motion curves how many of its training videos have one.

    Raises:
        DataError: as `check_motion`.
    """
    lines = [
        check_motion(name, load_index(source.shards, recipe.data.deadline_s), rule.choice, recipe.data.deadline_s)
        for (name, source), rule in zip(recipe.data.sources.items(), rules, strict=True)
        if rule.choice.needs_motion
    ]
    return [line for line in lines if line]
