"""How a model is served."""

from dataclasses import dataclass

from melinoe.config.names import STORES, policies
from melinoe.config.setting import check_choices, setting
from melinoe.errors import BudgetError


def experts_in_share(share: float, num_experts: int) -> int:
    """
    How many experts a share of a layer's experts is: rounded to the nearest, at least one.

    Halves round up, so 0.25 of 6 experts is 2 and 0.25 of 64 is 16.
    """
    return max(1, min(num_experts, int(share * num_experts + 0.5)))


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """
    How a model is served with few resident experts.

    Raises:
        BudgetError: a value that no run could use; the sentence names it.
    """

    slots: float = setting(
        0.25, "resident experts of each layer", unit="share of a layer's experts"
    )
    policy: str = setting("lru", "which resident expert leaves first", choices=policies)
    store: str = setting("auto", "where the other experts live", choices=STORES)
    max_new_tokens: int = setting(64, "generated per prompt at most", unit="tokens")

    def __post_init__(self) -> None:
        check_choices(self, BudgetError)
        if not 0 < self.slots <= 1:
            raise BudgetError(f"slots cannot be {self.slots}; it must be in (0, 1], a share")
        if self.max_new_tokens < 1:
            raise BudgetError(
                f"max_new_tokens cannot be {self.max_new_tokens}; it must be 1 or more"
            )
