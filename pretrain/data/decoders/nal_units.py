"""Coded pictures of H.264 to which no other picture refers, told by two bits of their NAL units.

Source: ITU-T H.264, 7.4.1 (nal_ref_idc, nal_unit_type).
"""

from typing import Any

#: NAL unit types that hold a part of a picture: slices, slices of data partitioning, slices of key frames.
SLICES = frozenset(range(1, 6))


def length_bytes(extradata: bytes) -> int | None:
    """Read how many bytes hold each NAL unit's length, from the avcC record of MP4 and Matroska (ISO 14496-15, 5.3.3).

    None for streams with start codes (MPEG-TS, AVI), which have no such record.
    """
    return (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else None


def is_reference(packet: Any, length: int | None) -> bool:
    """Tell whether other pictures may refer to the one in a packet; True where that can't be told.

    Args:
        packet: One coded picture (both fields of it, if interlaced), with the buffer protocol.
        length: From `length_bytes`.
    """
    if length is None:
        return True
    data = memoryview(packet)
    place, slices = 0, 0
    while place + length < len(data):
        header = data[place + length]
        if header & 31 in SLICES:
            if header >> 5 & 3:
                return True
            slices += 1
        place += length + int.from_bytes(data[place : place + length], "big")
    # A packet without a slice is something else than a picture, and the decoder must see it.
    return slices == 0
