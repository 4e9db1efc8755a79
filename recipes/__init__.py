"""Release recipes, shipped as data: copy one and edit it."""
