"""Needs and costs of a run, computed before it is paid for."""
