"""Uses of a prompt's tokens, counted for a prefetcher."""

import pytest
import torch

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.engine.passes import Batch
from melinoe.engine.record import PromptUses
from melinoe.errors import AttachError


def counted(choices, phase=PROMPT, call=None, experts=(3,), close="end"):
    """Uses after one pass; *choices* by layer."""
    uses = PromptUses(experts)
    uses.begin(phase, len(choices[0]), call)
    for layer, rows in enumerate(choices):
        uses.add(layer, torch.tensor(rows))
    getattr(uses, close)()
    uses.end()
    return uses.counts().tolist()


def test_choices_of_the_prompts_rows_are_counted_and_padding_and_skip_slots_are_not():
    """Four tokens, the first one padding; ids 3 and -1 are no experts; two layers."""
    mask = torch.tensor([[0, 1, 1, 1]])
    first, second = [[0, 1], [1, 3], [2, 2], [-1, 1]], [[0, 1]] * 4
    found = counted([first, second], call=Batch(1, 4, 0, 4, mask), experts=(3, 2))
    assert found == [[0, 2, 2], [3, 3, 0]]


def test_guesses_behind_the_prompt_and_completions_are_not_counted():
    """Of three tokens the last one is a guess; a pass of the completion counts nowhere."""
    rows = [[0, 1], [0, 1], [2, 2]]
    assert counted([rows], call=Batch(1, 3, 0, 2, None)) == [[2, 2, 0]]
    assert counted([rows[:1]], phase=COMPLETION) == [[0, 0, 0]]


def test_a_dropped_pass_counts_nothing():
    """An exception ended it."""
    assert counted([[[0, 1]]], close="drop") == [[0, 0, 0]]


def test_what_was_chosen_is_kept_though_the_engine_renumbers_it():
    """The ids are copied when they are seen."""
    uses, ids = PromptUses([2]), torch.tensor([[0, 0]])
    uses.begin(PROMPT, 1, None)
    uses.add(0, ids)
    ids.fill_(1)
    uses.end()
    assert uses.counts().tolist() == [[2, 0]]


def test_prompts_that_come_together_are_refused():
    """A prefetch for one of them would be for the others, too."""
    with pytest.raises(AttachError, match="one sequence at a time and 2 came"):
        counted([[[0, 1]] * 4], call=Batch(2, 2, 0, 2, None))
