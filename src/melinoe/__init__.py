"""Melinoe: run Mixture-of-Experts models in a fraction of their memory."""
