"""How records name an emulated link."""

from typing import Any

from melinoe.engine.transfer import EmulatedLink


def link_fields(link: EmulatedLink | None) -> dict[str, Any] | None:
    """``{bandwidth_gb_s, latency_us, emulated}``; ``None`` where the link is as it is."""
    if link is None:
        return None
    return {
        "bandwidth_gb_s": link.bandwidth_bytes_per_s / 1e9,
        "latency_us": link.latency_s * 1e6,
        "emulated": True,
    }
