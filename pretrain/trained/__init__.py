"""After a run: load, export, model card, reconstruction, replay of a step."""
