"""Keep the experts that are not resident: on disk, in host memory, in pinned memory."""
