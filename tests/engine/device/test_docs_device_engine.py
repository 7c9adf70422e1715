"""The Python of docs/device-engine.md runs as it stands, on the CPU, with the model that ships."""

import re
from pathlib import Path

import melinoe
from melinoe.checkpoint import load_tokenizer
from melinoe.checkpoint.files import read_config
from melinoe.shipped import TINY_OLMOE

PAGE = (Path(__file__).parents[3] / "docs" / "device-engine.md").read_text()


def test_the_code_of_the_page_runs():
    """As a reader would type it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    tokenizer = load_tokenizer(str(TINY_OLMOE), read_config(str(TINY_OLMOE)))
    names = {
        "path": TINY_OLMOE,
        "tokenizer": tokenizer,
    }
    small = {"device=\"cuda\"": "device=\"cpu\"", "context=4096": "context=64",
             "max_new_tokens=16": "max_new_tokens=3"}  # fmt: skip
    for code in blocks:
        for here, there in small.items():
            code = code.replace(here, there)
        exec(compile(code, "docs/device-engine.md", "exec"), names)
    assert names["tokens"].shape[1] == names["ids"].shape[1] + 3
    assert isinstance(names["handle"], melinoe.engine.handle.Handle)
    names["handle"].detach()
