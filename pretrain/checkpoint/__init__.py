"""Checkpoints: write, verify, publish, resume, retain."""
