"""Proof that a quantized checkpoint is what it should be, by code that shares nothing with what wrote it.

`recompute` holds the values against the source, `structure` the names, shapes and configuration against what
engines load. `files`, `dialect`, `reference` and `recompute` import nothing of packager but its errors.
"""
