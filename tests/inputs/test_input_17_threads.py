"""
Four threads call `generate` on one loaded model: each gets its own text.

Three failed, or 48 texts of 224 were wrong without an error and the model stayed wrong afterwards.
Streamers, recordings, failures and `detach` in threads: `tests/engine/test_threads.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import melinoe
from melinoe.checkpoint import load_tokenizer
from melinoe.generate import generate
from melinoe.shipped import TINY_OLMOE

PROMPTS = ["One day", "The sum of 3 and 4", "Tom has 12 apples", "Once upon a time"]


def test_four_threads_get_the_texts_of_one():
    """Through `melinoe.generate`, each with the counters of its own text alone."""
    model, handle = melinoe.load(str(TINY_OLMOE), slots=4)
    tokenizer = load_tokenizer(str(TINY_OLMOE), model.config)

    def answer(prompt):
        handle.lock.acquire()  # the same residents before each, so that equal means equal counts
        try:
            handle.reset_cache()
            return generate(model, handle, tokenizer, prompt, 8)
        finally:
            handle.lock.release()

    alone = [answer(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        counted = list(pool.map(answer, PROMPTS))
        free = list(pool.map(lambda p: generate(model, handle, tokenizer, p, 8).ids, PROMPTS))
    assert [one.ids for one in alone] == [one.ids for one in counted] == free
    assert [one.counters for one in alone] == [one.counters for one in counted]
    assert handle.audit() > 0
