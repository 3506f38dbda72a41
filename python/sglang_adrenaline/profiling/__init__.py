"""Measurements for `python -m sglang_adrenaline.profile`: cpu.py and gpu.py time kernels, round_trip.py a channel."""
