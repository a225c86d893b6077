"""Checks that kinds of samples of single pictures share."""

from pretrain.samples import clip


def picture_problems(options: clip.Config, crop_share: float, squares: str, otherwise: str = "") -> list[str]:
    """List what in a section can't work with single square pictures, beside what can't with clips.

    Args:
        options: the section.
        crop_share: its side of the middle that is evaluated, as a share of the short side.
        squares: why they are squares.
        otherwise: what takes several frames.
    """
    found = []
    if options.frames != 1:
        found.append(f"input.frames: found {options.frames}, allowed: 1{otherwise}")
    if options.height != options.width:
        found.append(
            f"input.height={options.height}, input.width={options.width}: allowed: one number for both; {squares}"
        )
    if not 0 < crop_share <= 1:
        found.append(f"input.crop_share: found {crop_share}, allowed: above 0 and at most 1")
    return found
