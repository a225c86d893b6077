"""Numbers from predictions; no files and no models."""
