"""Sweeps: many trials of one pipeline with other settings, on Ray Tune. May import every other room of pipeline/ but cli."""
