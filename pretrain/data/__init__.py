"""Shards, order, streaming, decoding, sampling, transforms, masks, packing."""
