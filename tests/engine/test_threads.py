"""Several threads on one model: one after another, each right, and the books agree afterwards."""

import threading
import time

import pytest
import torch
from fast_attach import attach as fast_attach
from transformers import LogitsProcessor, TextIteratorStreamer

from melinoe import attach
from melinoe.errors import AttachError, CheckpointError
from melinoe.generate import generate
from melinoe.stores.ram_store import RamStore

PROMPTS = [torch.tensor([[5 + n, 6, 70 - n, 8 * n, 9]]) for n in range(1, 7)]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def in_threads(*tasks):
    """What each returned, or the exception that it raised; all are begun at once."""
    results = [None] * len(tasks)
    begin = threading.Barrier(len(tasks))

    def run(number):
        begin.wait(300)
        try:
            results[number] = tasks[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return results


@pytest.fixture
def slow_store(monkeypatch):
    """Reading an expert lets other threads run, in the midst of a layer."""
    real = RamStore.read

    def read(self, layer, expert, into):
        for view in into.values():
            view.fill_(float("nan"))
            time.sleep(1e-5)
        real(self, layer, expert, into)

    monkeypatch.setattr(RamStore, "read", read)


@pytest.mark.parametrize("way", ["generate", "calls", "experts"])
def test_threads_on_one_model_get_the_texts_of_one(model, slow_store, way):
    """Whole generations, single calls, and experts called by themselves."""

    def task(prompt):
        def run():
            if way == "generate":
                return model.generate(prompt, **GREEDY)
            if way == "experts":
                hidden = model.model.embed_tokens(prompt)[0].detach()
                index = prompt[0, :, None] % 8
                with torch.no_grad():
                    return model.model.layers[1].mlp.experts(hidden, index, torch.ones(5, 1))
            with torch.no_grad():
                return torch.cat([model(prompt).logits for _ in range(3)])

        return run

    tasks = [task(prompt) for prompt in PROMPTS]
    expected = [one() for one in tasks]
    with attach(model, slots=2) as handle:
        found = in_threads(*tasks)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        handle.audit()
        if way == "generate":
            assert handle.counters.tokens.tolist() == [5 * len(PROMPTS), 5 * len(PROMPTS)]
            assert handle.counters.forwards.tolist() == [len(PROMPTS), 5 * len(PROMPTS)]
        elif way == "calls":
            assert handle.counters.forwards.tolist() == [3 * len(PROMPTS), 0]


def test_threads_on_the_fast_engine(model):
    """The same with what a CPU shows of it."""
    expected = [model.generate(prompt, **GREEDY) for prompt in PROMPTS[:2]]
    with fast_attach(model, slots=4) as handle:
        found = in_threads(*[lambda p=p: model.generate(p, **GREEDY) for p in PROMPTS[:2]])
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        handle.audit()
        assert handle.counters.tokens.tolist() == [10, 10]


def test_a_recording_of_two_threads_holds_whole_texts(model, slow_store):
    """Their rows do not mix: each sequence is a prompt and what came after it."""
    with attach(model, slots=2) as handle, handle.record() as recorder:
        in_threads(*[lambda p=p: model.generate(p, **GREEDY) for p in PROMPTS[:3]])
    trace = recorder.trace()
    assert trace.kind.tolist() == ([0] * 5 + [1] * 5) * 3
    assert trace.sequence.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_each_thread_is_told_its_own_cost(slow_store):
    """`melinoe.generate` counts its own text alone, whatever others ask for meanwhile."""
    from small_olmoe import tiny_model, words_tokenizer

    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle:
        tasks = [lambda: generate(model, handle, tokenizer, [5, 6, 7], 5) for _ in range(3)]
        found = in_threads(*tasks)
    assert [one.counters.tokens.tolist() for one in found] == [[3, 4]] * 3
    assert len({one.text for one in found}) == 1


def test_another_thread_that_fails_spoils_nothing(model, monkeypatch):
    """Its read fails half-way; the others' texts are right and the books agree."""
    expected = [model.generate(prompt, **GREEDY) for prompt in PROMPTS[:3]]
    real, reads = RamStore.read, []

    def read(self, layer, expert, into):
        reads.append(expert)
        if len(reads) == 25:
            raise CheckpointError("the shard is torn")
        real(self, layer, expert, into)

    with attach(model, slots=2) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(RamStore, "read", read)
            found = in_threads(*[lambda p=p: model.generate(p, **GREEDY) for p in PROMPTS[:3]])
        assert sum(isinstance(one, CheckpointError) for one in found) == 1
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, CheckpointError) or torch.equal(one, other)
        handle.audit()


def test_detach_waits_for_another_threads_generation(model, slow_store):
    """The text is right, and so is the model afterwards."""
    expected = model.generate(PROMPTS[0], **GREEDY)
    begun = threading.Event()

    class Telling(LogitsProcessor):
        def __call__(self, ids, scores):
            begun.set()
            return scores

    handle = attach(model, slots=2)

    def detach():
        begun.wait(300)
        handle.detach()

    text, _ = in_threads(
        lambda: model.generate(PROMPTS[0], **GREEDY, logits_processor=[Telling()]), detach
    )
    assert torch.equal(text, expected)
    assert torch.equal(model.generate(PROMPTS[0], **GREEDY), expected)


def test_a_streamer_is_read_while_a_thread_generates(model):
    """As servers do it, with a recording open in the thread that reads."""

    class Plain:
        def decode(self, ids, **_):
            return " ".join(map(str, ids)) + " "

    with attach(model, slots=2) as handle, handle.record() as recorder:
        streamer = TextIteratorStreamer(Plain(), skip_prompt=True, timeout=300)
        thread = threading.Thread(
            target=model.generate, args=(PROMPTS[0],), kwargs=GREEDY | {"streamer": streamer}
        )
        thread.start()
        seen = "".join(streamer).split()
        assert handle.counters.tokens.sum() > 0
        thread.join(300)
    assert len(seen) == 6
    assert len(recorder.trace()) == 10


def test_a_generation_within_a_generation_is_counted_by_itself(model):
    """A logits processor asks the same model for another text: prompts and completions add up."""
    other = model.generate(PROMPTS[1], **GREEDY)
    expected = model.generate(PROMPTS[0], **GREEDY)
    inner = []

    class Asking(LogitsProcessor):
        def __call__(self, ids, scores):
            if not inner:
                inner.append(model.generate(PROMPTS[1].repeat(1, 2)[:, :8], **GREEDY))
                inner.append(model.generate(PROMPTS[1], **GREEDY))
            return scores

    with attach(model, slots=3) as handle:
        found = model.generate(PROMPTS[0], **GREEDY, logits_processor=[Asking()])
        assert torch.equal(found, expected) and torch.equal(inner[1], other)
        assert handle.counters.tokens.tolist() == [5 + 8 + 5, 15]
        handle.audit()


def test_the_model_as_its_own_assistant_is_one_text(model):
    """Its guesses are the completion's, as those of its first layers are."""
    expected = model.generate(PROMPTS[0], **GREEDY)
    with attach(model, slots=3) as handle:
        found = model.generate(PROMPTS[0], **GREEDY, assistant_model=model)
        assert torch.equal(found, expected)
        handle.audit()


def test_a_pass_that_is_interrupted_leaves_the_lock_free(model):
    """Ctrl-C between two layers: another thread goes on, and the pass is counted nowhere."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(PROMPTS[0]).logits
        with attach(model, slots=2) as handle:
            hook = model.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(PROMPTS[0])
            hook.remove()

            def call():
                with torch.no_grad():
                    return model(PROMPTS[0]).logits

            assert torch.equal(in_threads(call)[0], expected)
            assert handle.counters.forwards.tolist() == [1, 0]
            handle.audit()


def test_detaching_within_a_call_is_refused(model):
    """A hook that takes the experts' slots away while they are used."""
    with attach(model, slots=2) as handle, torch.no_grad():
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: handle.detach())
        with pytest.raises(AttachError, match="when it has returned"):
            model(PROMPTS[0])
        hook.remove()
        handle.audit()


@pytest.mark.parametrize("fault", ["slot", "books", "dictionary"])
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_the_audit_finds_a_planted_fault(model, engine, fault):
    """A byte of a slot; an expert said to be elsewhere; and after a reset all is well again."""
    with (fast_attach if engine == "fast" else attach)(model, slots=4) as handle, torch.no_grad():
        model.generate(PROMPTS[0], **GREEDY)
        assert handle.audit() == sum(map(len, handle.resident()))
        cache = handle._caches[1]
        if fault == "slot":
            slot = int(cache.residency.expert_of.argmax())
            cache.slots["down_proj"][slot].view(torch.uint8)[3, 2] ^= 1
        elif engine == "fast":
            residencies = handle.engine.residencies
            residencies.on_host[1].reset()  # the device is told of others than are there
            residencies.on_host[1].prefetch([7, 6, 5, 4])
            cache.slots["gate_up_proj"].zero_()
            residencies.push(1)
        elif fault == "books":
            cache.residency.expert_of[0] = cache.residency.expert_of[1]
        else:
            cache.residency._slot.popitem()
        words = "disagree" if engine == "reference" and fault != "slot" else "not what the store"
        with pytest.raises(AttachError, match=words + r".*reset_cache\(\)"):
            handle.audit()
        handle.reset_cache()
        assert handle.audit() == 0
