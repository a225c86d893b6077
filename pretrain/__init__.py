"""Tubelet's library: self-supervised pre-training of video models."""

__version__ = "0.1.0"
