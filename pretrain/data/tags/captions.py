"""Which captions are used: one rule for tagging and for training."""

import unicodedata

from pretrain.errors import SampleError

#: Blocks of Chinese, Japanese and Korean writing, first and last code point.
CJK = (
    (0x1100, 0x11FF), (0x2E80, 0x303F), (0x3040, 0x30FF), (0x3100, 0x318F), (0x31A0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0xFF66, 0xFFDC), (0x20000, 0x3FFFF),
)  # fmt: skip


def usable_caption(text: str) -> str:
    """Clean a caption: one line, no control characters, spaces once.

    Raises:
        SampleError: "caption_empty", or "caption_cjk" where it holds Chinese, Japanese or Korean, which CLIP's text
            tower can't read. Officially the next caption is then taken, for an image that it does not belong to.
    """
    spaced = ("" if unicodedata.category(one) in ("Cc", "Cf") and not one.isspace() else one for one in text)
    clean = " ".join("".join(spaced).split())
    if not clean:
        raise SampleError("caption_empty", "nothing but white space")
    if any(first <= ord(one) <= last for one in clean for first, last in CJK):
        raise SampleError("caption_cjk", f"Chinese, Japanese or Korean: {clean[:60]!r}")
    return clean
