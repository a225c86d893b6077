"""End-to-end action detection: one model finds the persons and tells what they do (EVAD)."""
