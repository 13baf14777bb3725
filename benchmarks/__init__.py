"""What is measured here, each script for itself: ``python -m benchmarks.NAME``."""
