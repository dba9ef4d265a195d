"""The fast paths beside plain ones: every claim of speed is a ratio measured here. `python -m benchmarks` runs all."""
