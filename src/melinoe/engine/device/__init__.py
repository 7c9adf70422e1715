"""The device engine: decoding that never asks the host which experts are missing."""
