"""What a run will need and take, computed before it is paid for."""
