"""Write, verify, publish, resume, retain."""
