"""Training the networks: the songs they learn from, and what becomes of them."""
