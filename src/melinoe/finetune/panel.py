"""Held-out texts in two halves: one to steer by, one to judge by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from melinoe.data import Encoded
from melinoe.errors import DataError

OWN, OTHER = "own", "other"
_FEWEST = 6


@dataclass(frozen=True)
class Panel:
    """
    Texts that no step trains on.

    Attributes:
        steering: Name of a domain to the texts whose gap steers the run; few, because they are read
            again and again.
        judging: The same for the texts that nothing looks at until the end.
    """

    steering: Mapping[str, Sequence[Encoded]]
    judging: Mapping[str, Sequence[Encoded]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        own: Sequence[Encoded],
        other: Sequence[Encoded] | None = None,
        *,
        steering: int = 48,
    ) -> "Panel":
        """
        Split texts: every third one steers, at most *steering* of each domain; the others judge.

        Args:
            own: Of the domain that is trained on.
            other: Of domains to protect.
            steering: At most so many.

        Raises:
            DataError: fewer than six texts of a domain.
        """
        parts: dict[str, tuple[list[Encoded], list[Encoded]]] = {}
        for name, texts in ((OWN, own), (OTHER, other)):
            if texts is None:
                continue
            if len(texts) < _FEWEST:
                raise DataError(
                    f"{len(texts)} held-out texts are too few to steer by some and judge by the "
                    f"others; give {_FEWEST} or more, and better some hundred"
                )
            chosen = range(0, len(texts), 3)[:steering]
            parts[name] = (
                [texts[i] for i in chosen],
                [text for i, text in enumerate(texts) if i not in chosen],
            )
        return cls(
            {name: pair[0] for name, pair in parts.items()},
            {name: pair[1] for name, pair in parts.items()},
        )

    def fingerprint(self) -> str:
        """Names the texts and their halves; equal panels have equal names."""
        digest = sha256()
        for half in (self.steering, self.judging):
            for name in sorted(half):
                for text in half[name]:
                    digest.update(f"{name} {text.input_ids} {text.completion_mask}".encode())
        return digest.hexdigest()
