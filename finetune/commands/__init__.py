"""Commands beside training: arguments and what they print; the work is done by the packages beside it."""
