"""Embeddings of a list of tags, as a frozen part: a row a tag, written by launch/tag.py beside the list."""

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.tags.tag_folder import BUILD, EMBEDDINGS, HASH, list_hash, read_tags
from pretrain.errors import DataError, StorageError, WeightsError
from pretrain.models.frozen import Frozen
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

#: Length of vectors below which they are not made longer (systems/tagalign.md, section 3).
FLOOR = 1e-6
#: Facts in the metadata of embeddings beside the hash of the list.
TEMPLATE, TOWER = "template", "tower_sha256"


class TagEmbeddings(nn.Module):
    """Normalised embeddings, float32 [K, E].

    Args:
        tags: K.
        embedding: E.
    """

    table: Tensor

    def __init__(self, tags: int, embedding: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(tags, embedding))

    def forward(self, images: Tensor) -> Tensor:
        """Compute cosines [B, K] with normalised images [B, E]."""
        return images @ self.table.t()


def frozen_tags(folder: str, tags: int, embedding: int) -> Frozen[TagEmbeddings]:
    """Make the embeddings of a run's tags: loaded when they are first asked, noted in checkpoints by their hash."""
    return Frozen("input.tags", folder, lambda: TagEmbeddings(tags, embedding), load_tags, "fp32", name="tags")


def load_tags(module: TagEmbeddings, folder: str) -> None:
    """Read the embeddings of a folder's list.

    Raises:
        WeightsError: there are none, they are of another list or order, of another size, or not finite.
    """
    where = storage.join(folder, EMBEDDINGS)
    try:
        tags, content = read_tags(folder), storage.read_bytes(where)
        stated, table = metadata_of(content), safetensors.torch.load(content)["table"].float()
    except (StorageError, DataError) as error:
        raise WeightsError(f"{error}; with --clip WEIGHTS {BUILD}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{where}: no embeddings of launch/tag.py ({error})") from error
    own = list_hash(tags)
    if stated.get(HASH) != own:
        # A wrong order changes every target, and the loss falls all the same.
        raise WeightsError(
            f"{where}: embeddings of the list {str(stated.get(HASH))[:12]}, tags.txt beside it is {own[:12]}: other "
            "tags, or in another order; embed them again (launch/tag.py --clip WEIGHTS)"
        )
    if table.shape != module.table.shape:
        raise WeightsError(
            f"{where}: {list(table.shape)}, allowed: {list(module.table.shape)} (input.tag_count, model.clip)"
        )
    if not table.isfinite().all():
        raise WeightsError(f"{where}: not finite; embed the tags again")
    module.table.copy_(F.normalize(table, dim=-1, eps=FLOOR))


def metadata_of(content: bytes) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        ValueError: it is none.
    """
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= len(content) - 8:
        raise ValueError("no header")
    found: dict[str, str] = parse_json(content[8 : 8 + length]).get("__metadata__", {})
    return found
