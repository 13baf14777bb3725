"""How the small ensemble was made: songs, configurations, training logs and scores."""
