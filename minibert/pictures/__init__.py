"""Runs as pictures: what was logged, and what student and teacher look at."""
