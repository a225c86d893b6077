"""Processes, signals, storage, logging, metrics, pictures."""
