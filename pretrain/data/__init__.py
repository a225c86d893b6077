"""Shards, order, streaming, decoding, packing."""
