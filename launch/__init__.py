"""Scripts that a person types, thin and without logic."""
