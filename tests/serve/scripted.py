"""A server in this process whose model writes what a test says: no model is computed."""

import asyncio
import itertools
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import uvicorn
from transformers import AutoTokenizer, GenerationConfig

from melinoe.serve.app import build_app
from melinoe.serve.batching import Limits, Piece, Running
from melinoe.serve.metrics import Metrics
from melinoe.shipped import TINY_OLMOE

# As Qwen's: a thought may be left out by a switch, calls of tools and their results are written.
TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


class Scripted:
    """
    Stand in for `Batches`: each request is answered by the next text, some tokens a piece.

    Attributes:
        prompts: Texts of the prompts that came.
        running: Names of the requests that were neither read to their end nor cancelled.
    """

    adapters, draining, healthy, ends, restarts = None, False, True, [0], []

    def __init__(self, tokenizer, texts, cut=False):
        self.tokenizer, self.texts, self.cut = tokenizer, iter(texts), cut
        self.limits = Limits(context=4096, cache_tokens=4096)
        self.prompts, self.running, self._numbers = [], {}, itertools.count()
        config = SimpleNamespace(model_type="qwen3_moe", vocab_size=len(tokenizer))
        config.get_text_config = lambda: config
        self.model = SimpleNamespace(config=config, generation_config=GenerationConfig())
        self.handle = SimpleNamespace(slots_by_layer=[])

    def counts(self):
        return len(self.running), 0

    def submit(self, prompt, asked, name):
        one = Running(f"{name}-{next(self._numbers)}", asked, prompt, asyncio.Queue())
        tokens = self.tokenizer(next(self.texts))["input_ids"] + [0] * (not self.cut)
        size = 1 + len(tokens) // 500
        for at in range(0, len(tokens), size):
            one.tokens += tokens[at : at + size]
            one.pieces.put_nowait(Piece(tokens[at : at + size], at + size >= len(tokens)))
        self.running[one.id] = one
        self.prompts.append(self.tokenizer.decode(prompt))
        return one

    def cancel(self, one, why=""):
        self.running.pop(one.id, None)
        one.ended = one.ended or time.perf_counter()


_clients = {}


def client(url):
    """OpenAI's own client of a server; it ends with it."""
    if url not in _clients:
        _clients[url] = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return _clients[url]


@contextmanager
def scripted(*texts, cut=False, **options):
    """Give the stand-in and the address of a server over it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    tokenizer.chat_template = TEMPLATE
    made = Scripted(tokenizer, texts, cut)
    app = build_app(made, Metrics(), tokenizer, "tiny", **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # whatever the system's habit
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield made, url
    finally:
        if url in _clients:
            _clients.pop(url).close()
        server.should_exit = True
        thread.join(60)
        listening.close()
