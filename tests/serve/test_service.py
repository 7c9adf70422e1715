"""A server as a service: its key, its end, what it keeps, and a model that fails under it."""

import asyncio
import gc
import json
import time

import pytest
import torch
from serving import Server, ask, opened
from small_olmoe import tiny_model, words_tokenizer
from transformers import GenerationConfig

import melinoe
from melinoe.errors import AttachError, MelinoeError
from melinoe.serve.batching import Batches, Limits, Piece, Running
from melinoe.serve.body import ApiError, Asked, Sampling
from melinoe.serve.handlers import ChatHandler, CompletionHandler
from melinoe.serve.metrics import Metrics
from melinoe.serve.run import Residency

LIMITS = Limits(running=2, waiting=8, context=200, max_tokens=160, cache_tokens=512, chunk=16)


def asked(tokens=8, priority=0):
    return Asked(tokens, Sampling(temperature=0), priority=priority)


@pytest.fixture
def batches():
    model = tiny_model()
    with melinoe.attach(model, slots=4) as handle:
        made = Batches(model, handle, LIMITS)
        yield made
        made.stop()


async def finish(one):
    while True:
        piece = await asyncio.wait_for(one.pieces.get(), 120)
        if piece.done:
            return piece.error


def plain(model, prompt, tokens):
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                          do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return made[0, len(prompt) :].tolist()


def test_costs_of_requests_that_ran_together_add_up_to_the_counters(batches):
    """Three requests of different lengths over two places."""

    async def run():
        ones = [batches.submit([3 + i] * (5 + 20 * i), asked(6), "r") for i in range(3)]
        for one in ones:
            assert await finish(one) is None
        return [one.cost for one in ones]

    costs, counters = asyncio.run(run()), batches.handle.counters
    assert sum(c.loads for c in costs) == pytest.approx(int(counters.loads.sum()))
    assert sum(c.hits for c in costs) == pytest.approx(int(counters.hits.sum()))
    assert sum(c.uses for c in costs) == pytest.approx(int(counters.uses.sum()))
    moved = sum(c.transferred_bytes for c in costs)
    assert moved == pytest.approx(batches.handle.transferred_bytes)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_greedy_text_is_the_plain_models_under_both_engines(engine):
    """Three requests of different lengths over two places, half of the experts resident."""
    prompts, lengths = [[5, 6, 7], [8] * 30, [11, 12]], (6, 3, 8)
    model = tiny_model()
    expected = [plain(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    with melinoe.attach(model, slots=4, engine=engine) as handle:
        made = Batches(model, handle, LIMITS)

        async def run():
            ones = [made.submit(p, asked(n), "r") for p, n in zip(prompts, lengths, strict=True)]
            for one in ones:
                assert await finish(one) is None
            return [one.tokens for one in ones]

        assert asyncio.run(run()) == expected
        made.stop()


class Names:
    """A predictor that always names the same experts, and notes who asked."""

    def __init__(self):
        self.asked = []

    def top(self, prompt, slots):
        self.asked.append((tuple(prompt), slots))
        return [[0, 1, 2, 3][:slots], [7, 6, 5, 4][:slots]]


def test_each_request_is_loaded_ahead_for_once_and_its_text_stays():
    """Three over two places: each prompt is asked for at its first step, in its share of slots."""
    prompts, texts, predictor = [[5, 6, 7], [8] * 30, [11, 12]], {}, Names()
    for guess in (None, predictor):
        with melinoe.attach(tiny_model(), slots=4) as handle:
            made = Batches(handle._model, handle, LIMITS, predictor=guess)

            async def run(made=made):
                ones = [made.submit(prompt, asked(10), "r") for prompt in prompts]
                for one in ones:
                    assert await finish(one) is None
                return ones

            ones = asyncio.run(run())
            made.stop()
            texts[guess] = [one.tokens for one in ones]
            ahead = int(handle.counters.prefetch_loads.sum())
            assert sum(one.cost.prefetched for one in ones) == ahead
            moved = sum(one.cost.transferred_bytes for one in ones)
            assert moved == pytest.approx(handle.transferred_bytes)
    assert texts[None] == texts[predictor] and ahead > 0
    assert sorted(one for one, _ in predictor.asked) == sorted(map(tuple, prompts))
    assert {slots for _, slots in predictor.asked} <= {2, 4}


def test_logits_that_are_no_numbers_end_their_request_and_reach_no_later_one():
    """
    A prompt with a token whose embedding is NaN shares its steps with others; then they come again.

    The others begin with a page of keys and values that a later request of the same prompt would
    share, and one is read in parts. Each ends in words or with its own text; later all have theirs.
    """
    model = tiny_model(max_position_embeddings=256)
    prompts = [[3 + i % 5 for i in range(40)], [5 + i % 7 for i in range(90)], [3, 4]]
    expected = [plain(model, prompt, 6) for prompt in prompts]
    broken = next(t for t in range(12, 32) if not any(t in text for text in expected))
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    with melinoe.attach(model, slots=4) as handle:
        made = Batches(model, handle, LIMITS._replace(running=4, chunk=64))

        async def run():
            asks = [[broken, 4], *prompts]
            ones = [made.submit(prompt, asked(6), "r") for prompt in asks]
            said = [await finish(one) for one in ones]
            assert "what the model says is not finite" in said[0]
            for why, one, text in zip(said[1:], ones[1:], expected, strict=True):
                assert "is not finite" in why if why is not None else one.tokens == text
            for prompt, text in zip(prompts, expected, strict=True):
                later = made.submit(prompt, asked(6), "r")
                assert await finish(later) is None and later.tokens == text

        try:
            asyncio.run(run())
            assert made.healthy and not made.running
            handle.audit()
        finally:
            made.stop()  # else its worker would keep a failed run from ending


def test_a_models_own_settings_hold_where_a_request_has_none():
    """Zero is a setting: temperature 0 takes the likeliest, top-k 0 keeps all."""
    given = GenerationConfig(do_sample=True, temperature=0.0, top_p=0.9, top_k=0)
    assert Sampling.of_model(given) == Sampling(temperature=0.0, top_p=0.9, top_k=None)
    given = GenerationConfig(do_sample=True, temperature=0.6, top_k=20)
    assert Sampling.of_model(given) == Sampling(temperature=0.6, top_k=20)
    assert Sampling.of_model(GenerationConfig(temperature=0.6)) == Sampling()


async def overtaken(made, prompts, lengths, begun):
    """Write two texts and, when the second has *begun* tokens, an urgent one, which ends first."""
    slow = [
        made.submit(prompt, asked(length, priority=5), "slow")
        for prompt, length in zip(prompts[:2], lengths[:2], strict=True)
    ]
    while len(slow[1].tokens) < begun:
        await asyncio.wait_for(slow[1].pieces.get(), 120)
    fast = made.submit(prompts[2], asked(lengths[2], priority=-1), "fast")
    assert await finish(fast) is None
    assert all(one.ended is None for one in slow)
    for one in slow:
        assert await finish(one) is None
    return [one.tokens for one in (*slow, fast)]


def each_alone(prompts, lengths):
    with melinoe.attach(tiny_model(), slots=8) as handle:
        model = handle._model
        return [plain(model, p, n) for p, n in zip(prompts, lengths, strict=True)]


def test_an_urgent_request_pauses_others_and_their_text_stays(batches):
    """Two long texts hold both places; one of a lower number ends before them."""
    prompts, lengths = [[5, 6, 7], [8, 9, 10], [11, 12, 13]], (150, 150, 10)
    got = asyncio.run(overtaken(batches, prompts, lengths, 3))
    expected, ends = each_alone(prompts, lengths), set(batches.ends)
    for tokens, whole in zip(got, expected, strict=True):
        cut = next((i + 1 for i, token in enumerate(whole) if token in ends), len(whole))
        assert tokens == whole[:cut]


def test_an_urgent_request_gets_the_memory_of_others_and_their_text_stays():
    """Two long texts hold all keys and values; one of a lower number ends before them."""
    model = tiny_model()
    prompts, lengths = [[5, 6, 7], [8, 9, 10], [11, 12] * 40], (120, 120, 5)
    with melinoe.attach(model, slots=4) as handle:
        made = Batches(model, handle, LIMITS._replace(running=3, cache_tokens=256))
        # When six of eight pages are full; the prompt needs three.
        got = asyncio.run(overtaken(made, prompts, lengths, 90))
        made.stop()
    assert got == each_alone(prompts, lengths)


def test_keys_and_values_of_a_cancelled_request_are_free_again(batches):
    """Long prompts cancelled while they are read, and while they write; then all room is free."""
    cache = batches._manager.batch_processor.cache
    free = cache.compute_free_capacity

    async def run():
        for number in range(6):
            one = batches.submit([number + 3] * 150, asked(40), "r")
            while free() == before:  # of an even number the prompt is not read yet
                await asyncio.sleep(0)
            if number % 2:
                await asyncio.wait_for(one.pieces.get(), 120)
            used.append(free())
            batches.cancel(one)
        await finish(batches.submit([9, 8], asked(2), "last"))

    before, used = free(), []
    asyncio.run(run())
    cache.evict_cached_blocks()  # kept for prompts that begin alike, until room is needed
    cache.pool.try_to_free_sectors()
    assert free() == before == 1 and max(used) < 1


def test_nothing_is_kept_of_requests_that_ended(batches):
    """Half of them cancelled after a token, half of them read to their end, all with a seed."""

    async def run():
        for number in range(6):
            settings = Sampling(temperature=1, seed=number, alternatives=2)
            wanted = Asked(12, settings)
            one = batches.submit([3, 4, 5 + number], wanted, "r")
            await asyncio.wait_for(one.pieces.get(), 120)
            if number % 2:
                batches.cancel(one)
                had = list(one.tokens)
                await asyncio.sleep(0.05)
                assert one.tokens == had and len(one.untold()) == len(had)
            elif one.ended is None:
                await finish(one)
        await finish(batches.submit([9, 8], asked(2), "last"))

    asyncio.run(run())
    router = batches._manager.output_router
    assert not batches.running and not router.result_handlers and router.output_queue.empty()


def test_a_request_ends_between_pieces_that_come_fast(batches):
    """Its time is over, though each piece is there at once."""
    batches.limits = LIMITS._replace(seconds=-1)
    handler = CompletionHandler(batches, Metrics(), words_tokenizer(), "tiny")

    async def run():
        one = Running("r", asked(), [1], asyncio.Queue())
        for _ in range(3):
            one.pieces.put_nowait(Piece([5], False))
        return [piece async for piece in handler.pieces(one)]

    with pytest.raises(ApiError) as error:
        asyncio.run(run())
    assert error.value.status == 504


def test_a_request_of_which_a_choice_finds_no_room_leaves_nothing_behind(batches):
    """Six run, ten have room, eight more are asked for: 429, and the six alone go on."""
    handler = CompletionHandler(batches, Metrics(), words_tokenizer(), "tiny")

    async def run():
        for _ in range(6):
            batches.submit([5, 6, 7], asked(60), "slow")
        with pytest.raises(ApiError, match="try again") as error:
            await handler.handle_request({"prompt": [5, 6], "n": 8, "max_tokens": 9}, "r")
        assert error.value.status == 429 and len(batches.running) == 6
        batches.fail_all("over")

    asyncio.run(run())


def test_tools_and_calls_that_a_template_does_not_write_are_refused(batches):
    """It writes contents alone; a call that is demanded needs no word of the template."""
    tokenizer = words_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    handler = ChatHandler(batches, Metrics(), tokenizer, "tiny")
    tool = {"type": "function", "function": {"name": "w9", "parameters": {}}}
    user = {"role": "user", "content": "w3 w4"}
    call = {"id": "a", "type": "function", "function": {"name": "w9", "arguments": "{}"}}
    assert handler.templated([user], None, {}) == [3, 4]
    assert handler.templated([user], [tool], {}, forced=True) == [3, 4]
    with pytest.raises(ApiError, match="does not write tools"):
        handler.templated([user], [tool], {})
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(ApiError, match="does not write tool_calls"):
        handler.templated([user, said], None, {})
    tokenizer.chat_template += (
        "{% for m in messages %}{% if m.tool_calls %}w9 {% endif %}{% endfor %}"
    )
    assert handler.templated([user, said], None, {}) == [3, 4, 9]


def test_a_stream_that_nobody_begins_to_read_ends(batches):
    """Its client left before the first byte: the answer is dropped, and nothing runs."""
    handler = CompletionHandler(batches, Metrics(), words_tokenizer(), "tiny")

    async def run():
        body = {"prompt": [5, 6], "max_tokens": 60, "stream": True}
        answer = await handler.handle_request(body, "r")
        assert len(batches.running) == 1
        del answer
        gc.collect()
        while batches.running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_cache_that_cannot_be_made_is_said_at_the_start(batches, capsys, caplog):
    """Not by the first request, and without a traceback."""
    with pytest.raises(AttachError, match="lower --cache-tokens"):
        Batches(batches.model, batches.handle, LIMITS._replace(cache_tokens=1 << 50))
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out + caplog.text


def test_a_model_that_fails_loses_what_ran_and_serves_the_next(batches, monkeypatch):
    """One step raises; the text after it is that of before, and five failures are too many."""
    forward, fails = batches.model.forward, [True]

    def failing(*args, **kwargs):
        if fails and fails.pop():
            raise OSError("the disk is gone")
        return forward(*args, **kwargs)

    async def one_text():
        return await finish(batches.submit([4, 5, 6], asked(4), "r"))

    assert asyncio.run(one_text()) is None
    monkeypatch.setattr(batches.model, "forward", failing)
    assert "the disk is gone" in asyncio.run(one_text())
    assert asyncio.run(one_text()) is None and len(batches.restarts) == 1 and batches.healthy
    for _ in range(5):
        fails.append(True)
        asyncio.run(one_text())
    batches._manager.join(time.perf_counter(), timeout=120)  # the last failure is over
    assert not batches.healthy
    with pytest.raises(ApiError, match="stopped working"):
        batches.check_alive()


def test_residency_comes_back_and_another_models_is_refused(tmp_path):
    """What was resident when it was written is resident after a restore, in an empty cache."""
    path = tmp_path / "kept.json"
    with melinoe.attach(tiny_model(), slots=4) as handle:
        assert not Residency(path, handle, "print").restore()
        handle.prefetch([[1, 3], [0, 5, 6]])
        Residency(path, handle, "print").write()
        handle.reset_cache()
        assert Residency(path, handle, "print").restore()
        assert handle.resident() == [[1, 3], [0, 5, 6]]
        with pytest.raises(MelinoeError, match="another model"):
            Residency(path, handle, "other").restore()
        path.write_text("[]")
        with pytest.raises(MelinoeError, match="holds no residency"):
            Residency(path, handle, "print").restore()


def test_a_server_asks_for_its_key_answers_by_an_adapters_name_and_ends_in_words(tmp_path, offline):
    """Without the key only /health and the page; each name has its model's text; exit 0 at last."""
    from test_adapters import trained
    from transformers import AutoModelForCausalLM

    from melinoe.finetune.adapter import adapter_of, write_adapter
    from melinoe.shipped import TINY_OLMOE

    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.bfloat16)
    parts = trained(model, 1, "router", 0.1)
    (tmp_path / "adapter").mkdir()
    write_adapter(adapter_of(parts), tmp_path / "adapter", str(TINY_OLMOE))
    write, _, tokenizer = offline
    ids = torch.tensor([tokenizer("The sea was")["input_ids"]])
    made = model.to(torch.bfloat16).generate(  # into which the adapter is merged
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    texts = {
        "fine": tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True),
        "tiny": write("The sea was", 6),
    }
    assert texts["fine"] != texts["tiny"]
    kept = tmp_path / "kept.json"
    server = Server(
        tmp_path, "--api-key", "secret", "--patience", "0.5", "--keep-residency", str(kept),
        "--adapter", f"fine={tmp_path / 'adapter'}",
    )  # fmt: skip
    try:
        assert ask(f"{server.url}/health")[0] == ask(server.url)[0] == 200
        for path in ("/status", "/metrics", "/v1/models"):
            assert ask(server.url + path)[0] == 401
            assert ask(server.url + path, key="secre")[0] == 401
            assert ask(server.url + path, key="secret")[0] == 200
        listed = json.loads(ask(f"{server.url}/v1/models", key="secret")[2])["data"]
        assert [one["id"] for one in listed] == ["tiny", "fine"]
        url = f"{server.url}/v1/completions"
        for name, text in texts.items():
            body = {"model": name, "prompt": "The sea was", "max_tokens": 6, "temperature": 0}
            answer = json.loads(ask(url, body, "secret")[2])
            assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
        body = {"prompt": "A long text", "max_tokens": 400, "stream": True, "temperature": 1,
                "logit_bias": {"0": -100}}  # fmt: skip
        with opened(url, body, "secret") as stream:
            stream.readline()
            assert server.stop() == 0
            rest = stream.read().decode()
        assert "the server is stopping" in rest or "[DONE]" in rest
        assert len(json.loads(kept.read_text())["resident"]) == 4
    finally:
        server.process.kill()
