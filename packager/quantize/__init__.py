"""FP8, INT8 and INT4: conversion, two dialects of the same block FP8, the way back to BF16, comparison."""

from packager.quantize.compare import diff
from packager.quantize.convert import dry_run, quantize
from packager.quantize.dequantize import dequantize
from packager.quantize.relabel import relabel

__all__ = ["dequantize", "diff", "dry_run", "quantize", "relabel"]
