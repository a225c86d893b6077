"""Sentences from features."""
