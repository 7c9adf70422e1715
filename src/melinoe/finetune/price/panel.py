"""Held-out texts in two halves: one to choose by, one to judge by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from melinoe.data import Encoded, Example, has_completion
from melinoe.errors import DataError

OWN, OTHER = "own", "other"
_FEWEST = 6


@dataclass(frozen=True)
class Panel:
    """
    Texts that no step trains on, by domain.

    Attributes:
        steering: Of those that choose, the ones read at every turn of a run; few, for that reason.
        choosing: Whose cost after the last step chooses between runs.
        judging: Which nothing looks at until all is chosen.
    """

    steering: Mapping[str, Sequence[Encoded]]
    choosing: Mapping[str, Sequence[Encoded]]
    judging: Mapping[str, Sequence[Encoded]]

    @classmethod
    def of(
        cls,
        own: Sequence[Encoded],
        other: Sequence[Encoded] | None = None,
        *,
        steering: int = 48,
    ) -> "Panel":
        """
        Split texts: every second one chooses, the others judge.

        Args:
            own: Of the domain that is trained on.
            other: Of domains to protect.
            steering: Of the choosing texts of each domain, at most so many steer.

        Raises:
            DataError: fewer than six texts of a domain.
        """
        domains = {OWN: own} if other is None else {OWN: own, OTHER: other}
        for texts in domains.values():
            if len(texts) < _FEWEST:
                raise DataError(
                    f"{len(texts)} held-out texts are too few to choose by some and judge by the "
                    f"others; give {_FEWEST} or more, and better some hundred"
                )
        return cls(
            {name: texts[::2][:steering] for name, texts in domains.items()},
            {name: texts[::2] for name, texts in domains.items()},
            {name: texts[1::2] for name, texts in domains.items()},
        )

    def fingerprint(self) -> str:
        """Names the texts and their halves; equal panels have equal names."""
        digest = sha256()
        for half in (self.steering, self.choosing, self.judging):
            for name in sorted(half):
                for text in half[name]:
                    digest.update(f"{name} {text.input_ids} {text.completion_mask}".encode())
        return digest.hexdigest()


def halves(
    examples: Sequence[Example], tokenizer: Any, max_length: int
) -> tuple[list[int], list[int]]:
    """
    Which of *examples* are among the texts that choose, and which judge, once they are encoded.

    Args:
        examples: As the search is given them; those without a completion within *max_length*
            tokens are in neither half.
        tokenizer: Of the model.
        max_length: Of the search.

    Returns:
        The places of each half, in order.
    """
    every = enumerate(examples)
    kept = [place for place, one in every if has_completion(one, tokenizer, max_length)]
    return kept[::2], kept[1::2]
