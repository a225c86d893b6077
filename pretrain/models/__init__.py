"""One file an architecture, official-weight import and export beside them."""
