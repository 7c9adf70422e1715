"""The real download code, end to end, against a hub of our own on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import damaged
import pytest
import torch
from hub_cache import commit_id
from hub_server import serving
from transformers import OlmoeForCausalLM

NAME = "nobody/olmoe"
LOAD = "(lambda m: first_logits(m[0]))(melinoe.load({name!r}, slots=2, store={store!r}))"
EXPERTS = (
    "(lambda c: (c.experts[0].num_experts, c.source, c.close())[:2])(open_checkpoint({name!r}))"
)


class Client:
    """A Python process that knows no hub but ours, and a cache of its own."""

    def __init__(self, endpoint: str, home: Path) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS_OFFLINE"))
            and not key.lower().endswith("_proxy")
        }
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "60",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_client.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, expression: str):
        """The expression's value as JSON, or ``(error type, sentence)``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["value"] if "value" in answer else (answer["error"], answer["message"])

    def close(self) -> None:
        self.process.communicate("", timeout=300)


@pytest.fixture(scope="module")
def commits(tmp_path_factory):
    """Two commits of one repository: four experts a layer, then six."""
    root = tmp_path_factory.mktemp("commits")
    return {
        commit_id(1): damaged.write_olmoe(root / "first"),
        commit_id(2): damaged.write_olmoe(root / "second", num_experts=6),
    }


@pytest.fixture(scope="module")
def world(commits, tmp_path_factory):
    """The hub, and a client that has downloaded nothing yet."""
    with serving(NAME, commits, {"main": commit_id(1), "v2": commit_id(2)}) as hub:
        client = Client(hub.endpoint, tmp_path_factory.mktemp("home"))
        try:
            yield hub, client
        finally:
            client.close()


def test_a_sharded_model_is_downloaded_once_and_runs(world, commits):
    """Its logits are those from the files; the second load asks for nothing but the branch."""
    hub, client = world
    with torch.no_grad():
        plain = OlmoeForCausalLM.from_pretrained(commits[commit_id(1)])
        expected = plain(torch.tensor([[5, 6, 7, 8]])).logits[0, -1, :5].tolist()
    downloads = []
    for store in ("disk", "ram"):
        assert client.ask(LOAD.format(name=NAME, store=store)) == pytest.approx(expected, abs=1e-4)
        downloads.append([path for method, path in hub.asked if method == "GET"])
    first, second = downloads
    shards = len(list(commits[commit_id(1)].glob("*.safetensors")))
    assert sum(path.endswith(".safetensors") for path in first) == shards
    assert not any(path.endswith(".bin") for path in first)
    assert second == first


def test_a_description_downloads_the_config_alone(world):
    """Of a revision that is not in the cache: no shard is asked for."""
    hub, client = world
    hub.asked.clear()
    found = client.ask(f"describe('{NAME}@v2').to_dict()")
    assert (found["supported"], found["weights"], found["num_experts"]) == (True, False, 6)
    assert {path.rpartition("/")[2] for method, path in hub.asked if method == "GET"} <= {
        "config.json"
    }


def test_a_revision_and_what_was_there_before_live_side_by_side(world):
    """The tag gives six experts a layer, main still four; each from its own commit."""
    _, client = world
    for revision, experts, commit in (("@v2", 6, 2), ("", 4, 1), (f"@{commit_id(2)}", 6, 2)):
        assert client.ask(EXPERTS.format(name=NAME + revision)) == [
            experts,
            f"{NAME}@{commit_id(commit)}",
        ]


def test_what_is_not_on_the_hub_is_one_sentence(world):
    """No such repository, no such revision."""
    _, client = world
    for name in ("nobody/nothing", f"{NAME}@v9"):
        error, message = client.ask(f"open_checkpoint('{name}')")
        assert error == "CheckpointError" and "check the name" in message and "\n" not in message


def test_a_download_that_breaks_is_one_sentence_and_goes_on_the_next_time(world, commits):
    """A shard is answered with an error, then cut in its middle, then whole: only then it opens."""
    hub, client = world
    commit = commit_id(3)
    hub.commits[commit] = damaged.write_olmoe(
        commits[commit_id(1)].with_name("third"), num_experts=5
    )
    hub.revisions |= {"v3": commit, commit: commit}
    shard = max(path.name for path in hub.commits[commit].glob("*.safetensors"))
    for fault in (hub.broken, hub.torn):
        fault.add(shard)
        error, message = client.ask(f"open_checkpoint('{NAME}@v3')")
        assert error == "CheckpointError" and "\n" not in message
        assert shard in message
        fault.clear()
    assert client.ask(EXPERTS.format(name=f"{NAME}@v3"))[0] == 5


def test_a_model_in_the_cache_opens_when_the_hub_is_gone(world):
    """Nobody answers any more: what was downloaded still runs, what was not is one sentence."""
    hub, client = world
    name = f"{NAME}@main"
    assert client.ask(EXPERTS.format(name=name))[0] == 4
    hub.gone = True
    try:
        assert client.ask(EXPERTS.format(name=name))[0] == 4
        error, message = client.ask("open_checkpoint('nobody/other')")
        assert error == "CheckpointError" and "check the name, the network" in message
    finally:
        hub.gone = False


def test_what_lies_beside_the_weights_is_fetched_to_be_copied(world, commits):
    """Licence and tokenizer, though nothing asked for them before; no other weights, no folder."""
    hub, client = world
    commit = commit_id(4)
    place = damaged.write_olmoe(commits[commit_id(1)].with_name("fourth"))
    for name in ("LICENSE", "README.md", "tokenizer.json", "other.safetensors", "model.gguf"):
        (place / name).write_text(name)
    (place / "original").mkdir()
    (place / "original" / "params.json").write_text("{}")
    hub.commits[commit] = place
    hub.revisions |= {"v4": commit, commit: commit}
    hub.asked.clear()
    names = client.ask(
        f"(lambda c: [p.name for p in checkpoint.writing.other_files(c)[0]])"
        f"(open_checkpoint('{NAME}@v4'))"
    )
    assert {"LICENSE", "README.md", "tokenizer.json", "config.json"} <= set(names)
    asked = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET"}
    assert not asked & {"other.safetensors", "model.gguf", "params.json"}
