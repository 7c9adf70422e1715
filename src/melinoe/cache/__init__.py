"""Who is resident in fast memory, and why: decisions and counts, no tensors and no copies."""
