"""Guards of a step: results and decisions, incidents, skipped steps, first non-finite module."""
