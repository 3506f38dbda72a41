"""Attention over a part of a sequence, and the exact merge of two parts. `lse` is float32 and base 2 everywhere."""
