"""Small things that several rooms ask of tensors: the format to add up in, content, and a hash of their values."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def sum_type(tensor: Tensor) -> torch.dtype:
    """Return the type to add up in: half types would lose a small share beside the others."""
    return torch.promote_types(tensor.dtype, torch.float32)


def has_content(tensor: Tensor) -> bool:
    """Tell whether a tensor has values: on the meta device, and where a plan traces a step, it has a shape alone."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Hash names and values of some tensors, whatever file they were read from."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        # Shape and dtype too: the same bytes in another shape are other values.
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode())
        # As bytes: NaN is unequal to itself, and NumPy has no bfloat16.
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
