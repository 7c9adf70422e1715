"""Find the experts and routers of a transformers model, record them, and compute experts."""
