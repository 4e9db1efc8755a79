"""Serving: memory and throughput plan, engine command lines, server life cycle."""

from packager.serving.cpu import fp8_runs_here
from packager.serving.engine import ServeSpec, vllm_command
from packager.serving.server import Server

__all__ = ["ServeSpec", "Server", "fp8_runs_here", "vllm_command"]
