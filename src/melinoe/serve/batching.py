"""Run many requests at once, a step at a time, and account for what each of them cost."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from melinoe.adapters import Adapters
from melinoe.errors import AttachError
from melinoe.predictor import Predictor
from melinoe.serve.body import ApiError, Asked
from melinoe.serve.sampling import Chosen, Sampler
from melinoe.serve.structured import matchers

_log = logging.getLogger("melinoe.serve")

# Tokens of one page of the cache of keys and values.
_PAGE = 32
_BROKEN = "what the model says is not finite; melinoe generate names the weight that makes it so"
# A worker that failed so often within a minute is not started again.
_MOST_RESTARTS = 5


class Limits(NamedTuple):
    """
    Bound what the server may spend.

    Attributes:
        running: Requests computed in one step at most.
        waiting: Requests that may wait beside them.
        context: Tokens of one prompt and its text.
        max_tokens: Written for one choice at most.
        cache_tokens: Room for keys and values, in tokens, for all requests.
        chunk: Tokens of one step: a longer prompt is read in several.
        seconds: For which one request may run.
        unasked: Tokens of an answer whose request does not say how many, where there is room; None
            writes as many as are allowed in a chat, and 16 behind a prompt, as OpenAI's API does.
    """

    running: int = 8
    waiting: int = 64
    context: int = 4096
    max_tokens: int = 1024
    cache_tokens: int = 16384
    chunk: int = 256
    seconds: float = 600.0
    unasked: int | None = None


@dataclass
class Cost:
    """
    Add up the work of the expert cache for one request.

    A step's loads are shared among its requests by their tokens in it, so the figures of requests
    that ran together are fractions, and those of all requests add up to the model's counters.
    """

    uses: float = 0.0
    hits: float = 0.0
    loads: float = 0.0
    prefetched: float = 0.0
    transferred_bytes: float = 0.0
    stall_s: float = 0.0
    zero_miss_tokens: int = 0

    @classmethod
    def total(cls, choices: Iterable[Running]) -> Cost:
        """Add up the costs of a request's choices."""
        costs = [vars(one.cost) for one in choices]
        return cls(**{name: sum(one[name] for one in costs) for name in vars(cls())})

    def usage(self) -> dict[str, Any]:
        """Give the figures for a response."""
        return {
            "hit_rate": round(self.hits / self.uses, 4) if self.uses else None,
            "zero_miss_tokens": self.zero_miss_tokens,
            "experts_loaded": round(self.loads, 2),
            "experts_prefetched": int(self.prefetched),
            "transferred_bytes": int(self.transferred_bytes),
            "stall_s": round(self.stall_s, 4),
        }


class Piece(NamedTuple):
    """Tokens that came since the last piece; *error* says why a request ended before its text."""

    tokens: list[int]
    done: bool
    error: str | None = None


@dataclass
class Running:
    """One choice of one request, from its admission to its last token."""

    id: str
    asked: Asked
    prompt: list[int]
    pieces: asyncio.Queue[Piece]
    cost: Cost = field(default_factory=Cost)
    began: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    ended: float | None = None
    tokens: list[int] = field(default_factory=list)
    drawn: list[Chosen] = field(default_factory=list)  # by the worker, where logprobs are asked for
    told: int = 0  # of them, by whoever answers
    stopped: bool = False  # by a stop string
    admitted: bool = False  # to a step
    broken: bool = False  # whether its logits were no numbers
    matcher: Any = None  # of its grammar

    def __post_init__(self) -> None:
        self.random = Random(self.asked.sampling.seed)

    def __deepcopy__(self, _: Any) -> Running:
        return self  # transformers copies what a request brings when it begins it again

    def untold(self) -> list[Chosen]:
        """Give the log-probabilities of tokens that came since the last call."""
        fresh = self.drawn[self.told : len(self.tokens)]
        self.told += len(fresh)
        return fresh


class TurnsScheduler(FIFOScheduler):
    """
    Compute requests of a lower number first; those that no step has room for pause.

    A paused request keeps its keys and values unless a more urgent one needs their room: then it
    is read again with what it had written, and goes on with the same text. A step computes requests
    of one adapter, and adapters that have some take turns.
    """

    use: Callable[[str | None], None] | None = None
    _turn = ""

    def _process_candidates(self, candidates: list[Any], *args: Any) -> Any:
        candidates = sorted(candidates, key=_priority)
        if candidates:
            self._make_room(candidates, args[0])
        if self.use is None or not candidates:
            return super()._process_candidates(candidates, *args)
        first = _priority(candidates[0])
        names = sorted({_adapter(one) for one in candidates if _priority(one) == first})
        at = bisect_right(names, self._turn)
        failed, starved = False, list[Any]()
        # The less urgent come last: where the first find no room, they go on and make some.
        for turn in dict.fromkeys([*names[at:], *names[:at], *map(_adapter, candidates)]):
            own = [one for one in candidates if _adapter(one) == turn]
            made = super()._process_candidates(own, *args)
            failed |= made[1]
            starved += self.starved_requests  # each call forgets those of the one before
            if made[0]:
                self._turn = turn
                self.use(turn or None)
                break
        self.starved_requests = starved
        return made[0], failed, *made[2:]

    def _make_room(self, candidates: list[Any], tokens: int) -> None:
        """Take the room of the least urgent for what the most urgent computes in this step."""
        first = candidates[0]
        own = first.remaining_prefill_tokens or first.tokens_to_process
        while not self.cache.can_store_request_tokens(first, min(len(own), tokens), dry_run=True):
            if self.cache.evict_cached_blocks():
                self.cache.pool.try_to_free_sectors()
                continue
            active = [one for one in candidates if one.request_id in self.active_requests]
            if not active or _priority(active[-1]) <= _priority(first):
                return
            candidates.remove(last := active[-1])
            last._status = RequestStatus.FINISHED
            self.finish_request(last.request_id)
            again = last.create_equivalent_initial_request()
            self.waiting_requests[again.request_id] = again
            self.waiting_requests_order.appendleft(again.request_id)


def _priority(state: Any) -> int:
    return state.logit_processor_kwargs["request"].asked.priority


def _adapter(state: Any) -> str:
    return state.logit_processor_kwargs["request"].asked.adapter or ""


SCHEDULER_MAPPING["melinoe"] = TurnsScheduler


class Batches:
    """
    Requests over one model, by transformers' continuous batching.

    Args:
        model: A model attached to *handle*.
        handle: Counts what its passes cost.
        limits: What may be spent.
        observe: Called in the worker after each step with the step's cost and seconds.
        adapters: Of the model, by which requests may be written.
        tokenizer: Of the model; needed only by requests with a grammar.
        predictor: Names experts to load ahead when a request's first step comes.
    """

    def __init__(
        self,
        model: Any,
        handle: Any,
        limits: Limits,
        observe: Callable[..., None] | None = None,
        adapters: Adapters | None = None,
        tokenizer: Any = None,
        predictor: Predictor | None = None,
    ) -> None:
        self.model, self.handle, self.limits = model, handle, limits
        self.adapters, self._predictor = adapters, predictor
        vocabulary = model.config.get_text_config().vocab_size
        self._matchers = matchers(tokenizer, vocabulary, self.ends)
        self.running: dict[str, Running] = {}
        self.restarts: list[float] = []
        self.draining = False
        self._observe = observe
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._manager: Any = None
        self._start()

    # --- requests -------------------------------------------------------------------------------

    def submit(self, prompt: list[int], asked: Asked, name: str) -> Running:
        """
        Put one choice into the queue. Call it in the event loop that reads its pieces.

        Raises:
            ApiError: the queue is full, the server stops, or its worker cannot be started again.
        """
        self.check_alive()
        if self.draining:
            raise ApiError("the server is stopping; ask another one", 503, code="stopping")
        if len(self.running) >= self.limits.running + self.limits.waiting:
            raise ApiError(
                "too many requests are waiting; try again in a second", 429, code="queue_full"
            )
        made = Running(f"{name}-{next(self._numbers)}", asked, prompt, asyncio.Queue())
        if asked.sampling.grammar is not None:
            made.matcher = self._matchers(asked.sampling.grammar)
        self.running[made.id] = made
        self._manager.register_result_handler(made.id, lambda output: self._take(made, output))
        taken = self._manager.add_request(
            prompt,
            request_id=made.id,
            max_new_tokens=asked.max_tokens,
            streaming=True,
            eos_token_id=self.ends,
            request=made,
        )
        if taken is None:  # the worker failed just now
            self.cancel(made)
            raise ApiError("the model failed just now; try again", 503, code="worker_died")
        return made

    def cancel(self, one: Running, why: str = "it was cancelled") -> None:
        """Stop computing a request; its slot and its keys and values are free after this step."""
        if self.running.pop(one.id, None) is not None:
            one.pieces.put_nowait(Piece([], True, why))
            self._manager.cancel_request(one.id)
            self._end(one)

    def fail_all(self, why: str) -> None:
        """End every request with the sentence *why*."""
        for one in list(self.running.values()):
            self.cancel(one, why)

    @property
    def ends(self) -> list[int]:
        """Token ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        ids = self.model.config.get_text_config().eos_token_id if ids is None else ids
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

    def counts(self) -> tuple[int, int]:
        """How many requests are computed, and how many wait."""
        processor = self._manager.batch_processor
        waiting = len(processor.scheduler.waiting_requests) if processor is not None else 0
        waiting += self._manager.input_queue.qsize()
        return max(0, len(self.running) - waiting), waiting

    def _take(self, one: Running, output: Any) -> None:
        """Pass on what the worker wrote; runs in the event loop."""
        if one.ended is not None:  # cancelled while a step computed it
            return
        if one.broken:
            self.cancel(one, _BROKEN)
            return
        fresh = output.generated_tokens[len(one.tokens) :]
        now = time.perf_counter()
        if fresh and one.first_at is None:
            one.first_at = now
        one.tokens += fresh
        done = output.is_finished()
        if done and self.running.pop(one.id, None) is not None:
            self._end(one)
        one.pieces.put_nowait(Piece(fresh, done, output.error))

    def _end(self, one: Running) -> None:
        one.ended = time.perf_counter()
        router = self._manager.output_router
        with router._lock:  # transformers forgets handlers of finished requests, not of cancelled
            router.result_handlers.pop(one.id, None)

    # --- the worker -----------------------------------------------------------------------------

    def check_alive(self) -> None:
        """
        Start the worker again if an error ended it.

        Raises:
            ApiError: it failed too often of late.
        """
        with self._lock:
            status = self._manager.background_thread_status
            if status.can_accept_new_requests() is None:
                return
            # A worker that fails tells its requests before it is over; wait until it is.
            self._manager.join(time.perf_counter(), timeout=2)
            error = status.fatal_error or "it stopped"
            if not self.healthy or self._manager.is_running():
                raise ApiError(
                    f"the model stopped working: {error}; ask again later", 503, code="worker_died"
                )
            self.restarts.append(time.monotonic())
            _log.error("the worker failed and starts again; what ran is lost: %s", error)
            self.fail_all(f"the model failed: {error}")
            self._manager.batch_processor = None  # its cache goes before the next one is made
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._start()

    @property
    def healthy(self) -> bool:
        """Whether requests are, or can be, computed."""
        if self._manager.background_thread_status.fatal_error is None:
            return True
        recent = [at for at in self.restarts if time.monotonic() - at < 60]
        return len(recent) < _MOST_RESTARTS

    def stop(self, seconds: float = 5.0) -> None:
        """End the worker; what still runs is lost."""
        self._manager.stop(block=True, timeout=seconds, hard_stop=True)

    def _start(self) -> None:
        limits = self.limits
        batching = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=-(-limits.cache_tokens // _PAGE),
            max_batch_tokens=max(limits.chunk, limits.running),
            max_requests_per_batch=limits.running,
            use_cuda_graph=False,  # the engine captures its own steps, and the sampler is Python
            use_async_batching=False,  # a step is accounted to the requests that it computed
            scheduler_type="melinoe",
            # Requests of two adapters that begin alike share no keys and values.
            allow_block_sharing=self.adapters is None,
        )
        # One end at most is asked of the config; each request brings the model's own.
        generation = GenerationConfig(do_sample=False, max_new_tokens=limits.max_tokens,
                                      eos_token_id=self.ends or -1)  # fmt: skip
        try:
            manager = self.model.init_continuous_batching(
                generation_config=generation, continuous_batching_config=batching
            )
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise AttachError(
                f"transformers cannot batch this model continuously: {error}; use melinoe chat or "
                "melinoe generate"
            ) from error
        processors = manager.logit_processor
        processors.logits_processor.append(Sampler())
        processors.tensors_required += 1
        processors.do_processing = True
        processors._retrieve_processors_kwargs()
        # Outputs without a handler are those of cancelled requests: nobody would read them.
        manager.output_router.output_queue.put = lambda *_: None
        step = manager._generation_step
        manager._generation_step = lambda: self._account(manager, step)
        self._manager, self._counted = manager, self.handle.counters
        theirs = logging.getLogger("ContinuousBatchingLogger")
        level = theirs.level
        theirs.setLevel(logging.CRITICAL)  # what it raises as it begins is said below, in words
        try:
            manager.start()
            while manager.batch_processor is None and manager.is_running():
                time.sleep(0.005)
        finally:
            theirs.setLevel(level)
        if (failure := manager.background_thread_status.fatal_error) is not None:
            raise AttachError(
                f"the cache of keys and values cannot be made: {failure}; lower --cache-tokens, or "
                "the tokens and requests of a step, or give fewer slots"
            ) from failure
        if self.adapters is not None:
            manager.batch_processor.scheduler.use = self.adapters.use

    def _account(self, manager: Any, step: Callable[[], None]) -> None:
        """Compute one step, and share out its cost among its requests."""
        handle, began = self.handle, time.perf_counter()
        before, bytes_before, stalled = self._counted, handle.transferred_bytes, handle.stall_s
        batch = manager.batch_processor.inputs_and_outputs.requests_in_batch
        ran = [(one, one.state.logit_processor_kwargs["request"]) for one in batch]
        if self._predictor is not None:
            for _, running in ran:
                if not running.admitted:
                    self._load_ahead(running, len(batch))
        step()
        seconds, after = time.perf_counter() - began, handle.counters
        self._counted = after
        whole = Cost(
            uses=int((after.uses - before.uses).sum()),
            hits=int((after.hits - before.hits).sum()),
            loads=int((after.loads - before.loads).sum()),
            prefetched=int((after.prefetch_loads - before.prefetch_loads).sum()),
            transferred_bytes=handle.transferred_bytes - bytes_before,
            stall_s=handle.stall_s - stalled,
        )
        tokens = sum(one.query_length for one in batch)
        for one, running in ran:
            share, cost = one.query_length / tokens, running.cost
            for name in ("uses", "hits", "loads", "transferred_bytes", "stall_s"):
                setattr(cost, name, getattr(cost, name) + share * getattr(whole, name))
            cost.zero_miss_tokens += bool(one.has_new_token and not whole.loads)
        if any(running.broken for _, running in ran):
            self._drop_broken(manager, ran)
        if self._observe is not None:
            self._observe(whole, seconds, tokens, sum(one.has_new_token for one in batch))

    def _drop_broken(self, manager: Any, ran: list[tuple[Any, Running]]) -> None:
        """
        Share no keys and values after a step with broken logits; end prompts that it read parts of.

        All rows of a step go through one attention, where a number that is none reaches the others.
        A request whose own logits are numbers has none of it; of half a prompt nobody can tell.
        """
        for one, running in ran:
            if not one.has_new_token:
                running.broken = True
                manager.output_router.deliver(one.state.to_generation_output())
            if running.broken:
                one.complete_blocks.clear()  # which transformers shares once this step is over
        cache = manager.batch_processor.cache
        cache.evict_cached_blocks()
        for allocator in cache.cache_allocators.values():
            allocator.ledger.hash_to_block.clear()
            allocator.ledger.block_to_hash.clear()

    def _load_ahead(self, one: Running, beside: int) -> None:
        """Load what its prompt is predicted to need, into its share of the slots."""
        assert self._predictor is not None
        one.admitted = True
        slots = max(1, self.handle.slots // beside)
        before = self.handle.counters.prefetch_loads
        self.handle.prefetch(self._predictor.top(one.prompt, slots))
        one.cost.prefetched += int((self.handle.counters.prefetch_loads - before).sum())
