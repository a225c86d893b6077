"""What a person types: thin scripts without logic."""
