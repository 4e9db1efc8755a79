"""EAGLE3 draft heads: responses and states from the served target, training, export, acceptance."""
