"""Train networks: songs, windows, the training loop, logs and export."""
