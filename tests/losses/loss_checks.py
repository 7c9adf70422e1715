"""A batch with packing and padding, and the comparison of a slow loss with ours."""

import torch


def packed_batch(seed, tokens=23, experts=6, top_k=2):
    """Two rows: two packed sequences and padding on the right; one sequence with left padding."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, experts, dtype=torch.float64, generator=g)
    # Not the top of the logits: what ran may have been chosen by other scores.
    index = torch.rand(2, tokens, experts, generator=g).topk(top_k).indices
    segments = torch.zeros(2, tokens, dtype=torch.int64)
    segments[0, 9:18], segments[0, 18:], segments[1, :3] = 1, -1, -1
    mask = torch.rand(2, tokens, generator=g) < 0.6
    return logits, index, mask & (segments >= 0), segments


def agree(slow_loss, fast_loss, *tensors):
    """Values and gradients of a slow float64 loss and ours, as functions of float tensors."""
    slow = [tensor.clone().requires_grad_() for tensor in tensors]
    fast = [tensor.float().requires_grad_() for tensor in tensors]
    expected, got = slow_loss(*slow), fast_loss(*fast)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(got.detach().double(), expected.detach(), atol=1e-5, rtol=1e-4)
    for one, other in zip(fast, slow, strict=True):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(one.grad.double(), wanted, atol=1e-6, rtol=1e-4)
    return float(expected.detach().sum())
