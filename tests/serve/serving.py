"""A server process on the shipped model, which is given a chat template; shared by all tests."""

import json
import re
import signal
import time
import urllib.error
import urllib.request

from forked_process import command

from melinoe.shipped import TINY_OLMOE

# Refuses a system message that shouts, to see whose words the client gets.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and 'SHOUT' in m.content %}"
    "{{ raise_exception('no shouting here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if tools %}tools: {% for t in tools %}{{ t.function.name }} {% endfor %}{{ '\\n' }}"
    "{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}be quick{{ '\\n' }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def opened(url, body=None, key=None):
    """The answer to bytes, chunks, an object or nothing, as it comes."""
    raw = body is None or isinstance(body, bytes) or hasattr(body, "__next__")
    request = urllib.request.Request(url, body if raw else json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    if key is not None:
        request.add_header("authorization", f"Bearer {key}")
    return urllib.request.urlopen(request, timeout=300)


def ask(url, body=None, key=None):
    """Send it; gives the status, the headers and the whole answer."""
    try:
        with opened(url, body, key) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


class Server:
    """A process of `melinoe serve`, its address, and what it wrote to its log."""

    def __init__(self, directory, *options, model=TINY_OLMOE):
        template = directory / "template.jinja"
        template.write_text(TEMPLATE)
        self.log = directory / "log.txt"
        words = [
            "serve", model, "--port", "0", "--name", "tiny", "--chat-template", template,
            "--slots", "8", *options,
        ]  # fmt: skip
        self.process = command(*words, log=self.log)
        until = time.monotonic() + 300
        while (found := re.search(r"listening at (\S+)", self.log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.1)
        self.url = found[1]

    def stop(self):
        """End it as a service manager would, and wait until it is gone."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(300)
