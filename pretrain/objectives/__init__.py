"""One file a self-supervised method: per-view tensors, targets and loss."""
