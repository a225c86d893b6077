"""Annotations of actions in space and time: a reader for each published format, and what they are turned into."""
