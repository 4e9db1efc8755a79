"""Turn a BailingMoeV2 checkpoint into a signed, validated bundle that anybody can download and serve."""

__version__ = "0.1.0"
