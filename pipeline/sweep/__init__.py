"""Sweeps: many trials of one pipeline with other settings, on Ray Tune. May import all of pipeline/ but cli."""
