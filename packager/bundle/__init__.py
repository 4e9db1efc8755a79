"""From sealed stages to a bundle: assembly, lock, model card, signature, verification."""
