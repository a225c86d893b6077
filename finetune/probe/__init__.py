"""Frozen evaluation: what a network's features are worth without changing it."""
