"""The texts that choose and judge, and what reading them costs and loads."""

import numpy as np
import pytest
import torch
from small_runs import examples, settings
from tiny import tiny_model

from melinoe.errors import DataError
from melinoe.finetune.price.panel import OTHER, OWN, Panel
from melinoe.finetune.price.reading import Loads, read
from melinoe.moe.routing import RoutingRecorder, find_routers


def test_choosing_and_judging_texts_are_apart_and_complete():
    """Nine texts: five choose, four judge; with a limit of two, two of the five steer."""
    texts = examples(9)
    panel = Panel.of(texts, texts[:6], steering=2)
    assert panel.choosing[OWN] == texts[::2] and panel.judging[OWN] == texts[1::2]
    assert panel.steering[OWN] == [texts[0], texts[2]]
    assert panel.choosing[OTHER] == [texts[0], texts[2], texts[4]]
    assert panel.fingerprint() != Panel.of(texts).fingerprint()
    with pytest.raises(DataError, match="too few"):
        Panel.of(texts[:5])


def test_reading_costs_what_each_text_costs_alone():
    """Batched and padded, against log-softmax of one text at a time, in the texts' order."""
    model, texts = tiny_model("olmoe").train(), examples(5)
    cost, trace = read(model, texts, settings(batch_size=2))
    assert trace is None and model.training
    for text, nll, tokens in zip(texts, cost.nll, cost.tokens, strict=True):
        ids = torch.tensor(text.input_ids)
        with torch.no_grad():
            log_p = model.eval()(ids[None]).logits[0].log_softmax(-1)
        wanted = [
            -log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if text.completion_mask[t]
        ]
        assert nll == pytest.approx(sum(wanted), rel=1e-5) and tokens == len(wanted)


def test_a_read_text_is_traced_as_a_generation():
    """Prompt rows in one pass, then a pass per completion token; ids are those that ran."""
    model, texts = tiny_model("olmoe"), examples(3)
    routers = find_routers(model)
    _, trace = read(model, texts, settings(batch_size=2), routers)
    at = 0
    for number, text in enumerate(texts):
        rows = slice(at, at + len(text))
        assert (trace.sequence[rows] == number).all()
        assert trace.kind[rows].tolist() == [int(one) for one in text.completion_mask]
        passes = trace.forward[rows] - trace.forward[at]
        assert passes.tolist() == [0, 0, 0, *range(1, len(text) - 2)]
        with RoutingRecorder(routers) as recorder, torch.no_grad():
            model(torch.tensor(text.input_ids)[None])
        for layer, one in enumerate(recorder.take()):
            assert trace.experts[rows, layer].tolist() == one.top_k_index.tolist()
        at += len(text)
    assert at == len(trace)


def test_loads_of_a_read_text_equal_a_list_of_those_used_last():
    """LRU with four slots, cold before each text, counted by hand for completion tokens."""
    model, texts = tiny_model("olmoe"), examples(3)
    _, trace = read(model, texts, settings(), find_routers(model))
    loads = Loads.of(trace, 4)
    for number in range(len(texts)):
        rows, count = np.flatnonzero(trace.sequence == number), 0
        for layer in range(trace.num_layers):
            prompt = sorted({e for row in rows[:3] for e in trace.experts[row, layer].tolist()})
            held = prompt[-4:]
            if len(prompt) > 4:
                break
            for row in rows[3:]:
                wanted = trace.experts[row, layer].tolist()
                count += sum(e not in held for e in wanted)
                held = ([e for e in held if e not in wanted] + sorted(wanted))[-4:]
        else:
            assert loads.loads["lru"][number] == count
    assert loads.tokens.tolist() == [sum(text.completion_mask) for text in texts]
