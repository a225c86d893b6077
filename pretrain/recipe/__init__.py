"""Typed recipes: schema, loading, checks, printing."""
