"""One YAML file a run; the files are data, this module only makes them installable."""
