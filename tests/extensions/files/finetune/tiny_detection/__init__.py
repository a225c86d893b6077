"""Boxes in pictures."""
