"""Runs on disk: configuration, the run itself, what it logs, sweeps, and the plan of what it takes."""
