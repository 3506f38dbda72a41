"""Attention offloading for SGLang: the prompt's KV stays on the prefill server."""

__version__ = "0.1.0"
