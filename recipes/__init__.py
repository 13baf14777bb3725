"""Recipes: how weights that come with the package were made."""
