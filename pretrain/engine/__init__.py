"""The step, the loop, optimiser, schedules, precision, guards."""
