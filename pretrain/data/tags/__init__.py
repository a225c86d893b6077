"""Tags from captions: what is parsed, the list that is kept, and which of them each sample has."""
