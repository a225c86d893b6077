"""Machines and links of a run examined."""
