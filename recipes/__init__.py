"""Release recipes, shipped as data beside this file."""
