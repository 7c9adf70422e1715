"""Uses of completions, counted without being recorded."""

import torch
from small_olmoe import EXPERTS, LAYERS, TOP_K, tiny_model

from melinoe import attach
from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.engine.passes import Batch
from melinoe.engine.record import UseMeter


def test_choices_of_completion_rows_are_counted_and_padding_and_skip_slots_are_not():
    """Two rows of two tokens, the second row's first one padding; ids 3 and -1 are no experts."""
    meter = UseMeter([3, 2])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    meter.begin(COMPLETION, 4, Batch(2, 2, 3, 0, mask))
    meter.add(0, torch.tensor([[0, 1], [1, 3], [2, 2], [-1, 1]]))
    meter.add(1, torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    meter.end()
    assert meter.counts().tolist() == [[1, 3, 0], [3, 3, 0]]


def test_a_prompts_pass_and_a_dropped_pass_count_nothing():
    """Only what was decoded to its end."""
    meter = UseMeter([2])
    for phase, close in ((PROMPT, meter.end), (COMPLETION, meter.drop)):
        meter.begin(phase, 1, None)
        meter.add(0, torch.tensor([[0, 1]]))
        close()
    meter.end()
    assert meter.counts().tolist() == [[0, 0]]


def test_what_was_chosen_is_kept_though_the_engine_renumbers_it():
    """The ids are copied when they are seen."""
    meter, ids = UseMeter([2]), torch.tensor([[0, 0]])
    meter.begin(COMPLETION, 1, None)
    meter.add(0, ids)
    ids.fill_(1)
    meter.end()
    assert meter.counts().tolist() == [[2, 0]]


def test_a_batch_is_counted_row_by_row():
    """Two rows, one padded in front, four decoded tokens each."""
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with attach(model, slots=EXPERTS) as handle, handle.measure_uses() as meter:
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert meter.counts().sum() == 2 * 4 * TOP_K * LAYERS
