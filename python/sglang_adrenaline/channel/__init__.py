"""Data plane between decode and the attention executor: interfaces in `base`, one module per transport."""
