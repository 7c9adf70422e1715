"""What transformers calls the parts of an MoE model: experts, routers, and how to compute them."""
