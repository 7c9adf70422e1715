"""Which steps a captured one may stand for: same inputs, same memory, same model, same mode."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import tiny
import torch
from replayed import BATCH, attach, plain, static
from small_olmoe import tiny_model
from transformers.cache_utils import StaticCache

import melinoe.engine.device.graphs as graphs_module
from melinoe.engine.device.graphs import fingerprint


def test_another_prompt_or_batch_size_is_another_kind(model):
    """Longer texts get a new cache and a new capture; shorter ones use the kept one."""
    with attach(model, slots=8, graphs=True) as handle:
        for ids, tokens in ((BATCH[:1], 8), (BATCH[:2], 8), (BATCH[1:2], 14), (BATCH[1:2], 5)):
            expected_rows = static(model, ids, tokens)
            with handle.graphs.paused():
                assert torch.equal(static(model, ids, tokens), expected_rows)
        assert handle.graphs.captured >= 3
        assert handle.graphs.reason is None


def test_inference_mode_and_no_grad_may_take_turns(model):
    """A cache made in one cannot be written in the other, so it is not kept."""
    with attach(model, slots=8, graphs=True) as handle:
        expected = static(model, BATCH[:1])
        with torch.inference_mode():
            assert torch.equal(static(model, BATCH[:1]), expected)
            assert torch.equal(static(model, BATCH[:1]), expected)
        assert torch.equal(static(model, BATCH[:1]), expected)
        assert handle.graphs.reason is None


def test_a_window_that_fills_up_is_another_kind(monkeypatch):
    """Eight tokens, four of them the prompt's; then every step rolls it. Two kinds, no more."""
    model = tiny.tiny_model("gpt_oss", sliding_window=8)
    expected = plain(model, BATCH, 12)
    with attach(model, slots=8, graphs=True) as handle:
        for _ in range(2):
            assert torch.equal(static(model, BATCH, 12), expected)
        # Of eleven steps four fill the window; the first step of each kind runs as it is.
        assert (handle.graphs.captured, handle.graphs.replayed) == (2, 9 + 11)
        assert handle.counters.tokens.tolist() == [2 * 16, 2 * 44]
    # Were the count left to Python, the window would never seem full to a replayed step.
    monkeypatch.setattr(graphs_module.static_cache, "set_counts", lambda *_: None)
    with attach(model, slots=8, graphs=True), pytest.raises(IndexError):
        static(model, BATCH, 12)


def test_constants_are_made_outside_the_graph(monkeypatch):
    """A full window makes a tensor of a number in each step, which a GPU could not capture."""
    model = tiny.tiny_model("gpt_oss", sliding_window=4)
    monkeypatch.setattr(graphs_module.Constants, "giving", lambda self: nullcontext())
    with attach(model, slots=8, graphs=True) as handle:
        static(model, BATCH[1:2])
        assert "CPU and CUDA tensors" in handle.graphs.reason


def test_at_most_so_many_kinds_are_kept(model, monkeypatch):
    """The oldest goes first."""
    monkeypatch.setattr(graphs_module, "_MOST_KINDS", 2)
    with attach(model, slots=8, graphs=True) as handle:
        step = handle.graphs
        for length in (10, 11, 12):
            cache = StaticCache(config=model.config, max_cache_len=length)
            with torch.no_grad():
                model(BATCH[1:2], past_key_values=cache)
                for _ in range(3):
                    step.step(input_ids=BATCH[:1, -1:], past_key_values=cache, return_dict=True)
        assert (step.captured, sum(one.captured is not None for one in step._kinds.values())) == (
            3,
            2,
        )


def test_steps_of_a_model_that_has_changed_are_captured_anew(original):
    """Another head, a hook, an adapter's switch: the text is that of the model as it is now."""
    model = copy.deepcopy(original)
    ids = BATCH[1:2]
    with attach(model, slots=8, graphs=True) as handle:
        before = static(model, ids)
        own = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(own.detach().flip(0))
        with handle.graphs.paused():
            expected = static(model, ids)
        assert not torch.equal(expected, before)
        for _ in range(2):
            assert torch.equal(static(model, ids), expected)
        assert handle.graphs.captured == 2
        model.lm_head.weight = own
        assert torch.equal(static(model, ids), before)
        seen = []
        hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        static(model, ids)
        assert seen
        hook.remove()
        captured = handle.graphs.captured
        static(model, ids)
        model.lm_head.weight.data.mul_(1)  # in place: what was captured reads it anew
        static(model, ids)
        assert handle.graphs.captured == captured + 1


def test_memory_of_graphs_that_are_gone_is_not_captured_into_again(model, monkeypatch):
    """Libraries keep memory in it that outlives them, so a new set of graphs has a new pool."""
    pools = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    with attach(model, slots=8, graphs=True) as handle:
        graphs, used = handle.graphs, []
        make = graphs._make
        graphs._stream = "its own"

        def noted(run, pool, stream):
            used.append((pool, stream))
            return make(run, pool, stream)

        monkeypatch.setattr(graphs, "_make", noted)
        for batch, tokens in ((1, 6), (1, 6), (1, 9), (2, 9)):
            static(model, BATCH[1 : 1 + batch], tokens)
        assert used == [(0, "its own"), (1, "its own"), (2, "its own")]


def test_two_kinds_share_a_constant_in_one_memory():
    """The first captured step knows where it lies, so learning it again must not move it."""
    model = tiny.tiny_model("gpt_oss", sliding_window=4)
    with attach(model, slots=8, graphs=True) as handle:
        made = handle.graphs._constants._made
        static(model, BATCH[1:2], return_dict_in_generate=True)
        before = {key: one.data_ptr() for key, one in made.items()}
        static(model, BATCH[1:3])
        assert handle.graphs.captured == 2 and before
        assert {key: made[key].data_ptr() for key in before} == before


def test_what_a_model_is_shows_in_its_fingerprint():
    """Memory, hooks, modes, adapters and attention; not values that change where they lie."""
    network = tiny_model()
    seen = [fingerprint(network)]

    def changed():
        now = fingerprint(network)
        new = now != seen[-1]
        seen.append(now)
        return new

    network.lm_head.weight.data.add_(1)
    assert not changed()
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    assert changed()
    hook = network.model.layers[0].register_forward_pre_hook(lambda *_: None)
    assert changed()
    hook.remove()
    assert changed() and seen[-1] == seen[-3]
    network.train()
    assert changed()
    network.lm_head.scaling = {"default": 0.5}
    assert changed()
    network.lm_head.scaling["default"] = 0.7
    assert changed()
    network.set_attn_implementation("eager")
    assert changed()


def test_two_caches_of_the_callers_are_two_kinds(model):
    """A captured step knows one memory; the other cache must not be served by it."""
    with attach(model, slots=8, graphs=True) as handle, torch.no_grad():
        caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
        for cache, ids in zip(caches, (BATCH[1:2], BATCH[3:4]), strict=True):
            model(ids, past_key_values=cache)
        mask = (torch.arange(12) <= 4)[None, None, None]
        found = []
        for _ in range(3):
            for cache in caches:
                step = {"input_ids": BATCH[1:2, :1], "position_ids": torch.tensor([[4]]),
                        "attention_mask": mask, "past_key_values": cache}  # fmt: skip
                found.append(handle.graphs.step(**step).logits.clone())
                for layer in cache.layers:  # back to the prompt's end
                    layer.cumulative_length.fill_(4)
        assert handle.graphs.captured == 2
    assert all(torch.equal(one, found[place % 2]) for place, one in enumerate(found))
    assert not torch.equal(found[0], found[1])
