"""From a sample's members to arrays, one file a kind of sample, and what they share."""
