"""Networks and nothing else: each turns a batch of stereo waveforms into its sources' estimates."""
