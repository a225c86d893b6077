"""Tools for the time after a run: load, export, model card, reconstruction, replay of a step."""
