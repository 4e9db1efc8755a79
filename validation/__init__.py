"""Measure a served model and say pass, fail or not measured. Imports nothing from `packager`."""
