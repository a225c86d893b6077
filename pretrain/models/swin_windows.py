"""Windows of a clip's tokens, as Video Swin's attention cuts them (Liu et al., 2106.13230)."""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Frames, height and width.
Size = tuple[int, int, int]


def filled_up(x: Tensor, multiple: Size) -> Tensor:
    """Fill [B, T, H, W, C] up with zeros, behind, below and right, to multiples of three numbers."""
    frames, height, width = (-whole % side for whole, side in zip(x.shape[1:4], multiple, strict=True))
    return F.pad(x, (0, 0, 0, width, 0, height, 0, frames)) if frames or height or width else x


def fitted(size: Size, window: Size, shifted: bool) -> tuple[Size, Size]:
    """Cut a window to a clip that is no larger, in each direction; there it is not shifted either."""
    cut = [(min(whole, side), side // 2 if shifted and whole > side else 0)
           for whole, side in zip(size, window, strict=True)]  # fmt: skip
    (frames, height, width), (later, down, right) = zip(*cut, strict=True)
    return (frames, height, width), (later, down, right)


def to_windows(x: Tensor, window: Size) -> Tensor:
    """Lay tokens [B, T, H, W, C], of whole windows, out as windows [B, n, N, C]."""
    frames, height, width = window
    x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).unflatten(1, (-1, frames))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def from_windows(x: Tensor, window: Size, size: Size) -> Tensor:
    """Lay windows [B, n, N, C] out as the tokens [B, T, H, W, C] that they were cut from."""
    counts = [whole // side for whole, side in zip(size, window, strict=True)]
    x = x.unflatten(2, window).unflatten(1, counts).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def relative_positions(window: Size) -> Tensor:
    """Number the differences of places of each two tokens of a window, int64 [N, N]."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in window)).view(-1, 3)
    differences = places[:, None] - places[None] + torch.tensor(window) - 1
    _, height, width = (2 * side - 1 for side in window)
    return (differences * torch.tensor([height * width, width, 1])).sum(-1)


def strangers(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Tell which two tokens of a window, after the shift, are no neighbours in the clip, bool [n, N, N]."""
    regions = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    for axis, (whole, side, step) in enumerate(zip(size, window, shift, strict=True)):
        place = torch.arange(whole, device=device)
        # The last window holds what the roll has brought from the other end. Without a shift all is one region.
        part = (place >= whole - side).long() + (place >= whole - step) if step else torch.zeros_like(place)
        regions = 3 * regions + part.view([-1 if axis == other else 1 for other in range(3)])
    cut = to_windows(regions[None, ..., None], window)[0, :, :, 0]
    return cut[:, :, None] != cut[:, None, :]
