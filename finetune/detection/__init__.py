"""Spatio-temporal action detection: what persons on a keyframe do."""
