"""Ask each router early about the tokens of a text that is read in one pass."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from melinoe.cache.trace import COMPLETION_ROW, Trace, known_ids
from melinoe.moe.next_router import NextRouters
from melinoe.moe.routing import Router, find_routers


class EarlyRouters:
    """
    Asks each router about the inputs of the one before it, while it is open.

    A recording asks only where few tokens are decoded, as a prefetch would; here a whole text is
    read in one pass in place of decoding it, so all its tokens are asked about.
    """

    def __init__(self, model: Any) -> None:
        routers = find_routers(model)
        self._rows = 0  # tokens of the text that is being read
        self._next = NextRouters(routers)
        self._said: list[list[np.ndarray]] = [[] for _ in routers]
        self._before: Router | None = None  # the router whose inputs the next one is asked about
        self._stack = ExitStack()
        self._stack.callback(self._next.close)
        hooks = [router.module.register_forward_hook(self._ask(router)) for router in routers]
        hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for hook in hooks:
            self._stack.callback(hook.remove)

    def __enter__(self) -> "EarlyRouters":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._rows = kwargs["input_ids"].numel()

    def _ask(self, router: Router) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            before, self._before = self._before, router
            if before is None or before.index >= router.index:  # a text begins
                return
            top_k = router.top_k or router.num_experts
            said = self._next.guess(before.index, router.index, self._rows, top_k)
            self._said[router.index].append(known_ids(said.cpu().numpy(), router.num_experts))

        return hook

    def added_to(self, trace: Trace) -> Trace:
        """The trace of these texts, with guesses: -1 in prompts, and in the first layer."""
        out = np.full_like(trace.experts, -1)
        for layer, said in enumerate(self._said):
            if said:
                found = np.concatenate(said)[:, : trace.top_k]
                out[:, layer, : found.shape[1]] = found
        out[trace.kind != COMPLETION_ROW] = -1
        return replace(trace, guesses=out)
