"""Block FP8: conversion, two dialects of the same bytes, and the way back to BF16 from these and others."""

from packager.quantize.compare import diff
from packager.quantize.convert import dry_run, quantize
from packager.quantize.dequantize import dequantize
from packager.quantize.relabel import relabel

__all__ = ["dequantize", "diff", "dry_run", "quantize", "relabel"]
