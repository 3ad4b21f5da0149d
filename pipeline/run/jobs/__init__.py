"""Runs that a Ray cluster executes as jobs: what is sent, and how a job is started, watched and stopped."""
