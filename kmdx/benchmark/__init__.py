"""How fast an ensemble is on this machine, against the same ensemble in the plainest form."""
