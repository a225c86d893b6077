"""Distillation: a student learns what a larger, frozen teacher says of the same views."""
