"""A batch with padding, and the comparison of a slow loss with ours."""

import torch


def padded_batch(seed, tokens=23, experts=6, top_k=2):
    """Two rows, the first with five tokens of padding on the right; some tokens count."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, experts, dtype=torch.float64, generator=g)
    # Not the top of the logits: what ran may have been chosen by other scores.
    index = torch.rand(2, tokens, experts, generator=g).topk(top_k).indices
    mask = torch.rand(2, tokens, generator=g) < 0.6
    mask[0, -5:] = False
    return logits, index, mask


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
