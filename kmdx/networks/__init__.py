"""Networks: each turns a batch of stereo waveforms into estimates of its sources."""
