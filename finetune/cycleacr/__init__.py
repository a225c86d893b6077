"""CycleACR: actions of persons from the cycle of actor and context, other persons, and the seconds around."""
