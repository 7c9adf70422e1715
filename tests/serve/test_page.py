"""The page at `/` in a headless browser; needs Debian's chromium and chromium-driver."""

import shutil
import time

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("chromedriver") is None, reason="apt install chromium chromium-driver"
)


# The page notes how long the answer is whenever it grows.
NOTE_LENGTHS = """
window.lengths = [];
new MutationObserver(() => {
  const boxes = document.querySelectorAll(".message.assistant");
  if (boxes.length && boxes[boxes.length - 1].textContent.length)
    window.lengths.push(boxes[boxes.length - 1].textContent.length);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


@pytest.fixture(scope="module")
def browser():
    """One headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield made
    made.quit()


@pytest.fixture
def page(browser, server):
    """Open the page and wait until it knows the model."""

    def open_page(width=1280, scheme="light"):
        browser.set_window_size(width, 900)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.get(server.url)
        until(lambda: browser.find_element("id", "model").text == "tiny")
        return browser

    return open_page


def until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_chat_streams_and_the_page_shows_what_it_cost(page, server):
    """The answer grows while it comes; the map has the slots' experts, the table a new row."""
    browser = page()
    browser.execute_script(NOTE_LENGTHS)
    browser.find_element("id", "text").send_keys("Tell me of the sea\n")

    def lengths():
        return set(browser.execute_script("return window.lengths"))

    until(lambda: lengths() and browser.find_element("id", "send").text == "Send")
    assert len(lengths()) > 2, "it came in one piece"
    until(lambda: browser.find_elements("css selector", "#recent tr"))
    row = browser.find_element("css selector", "#recent tr").text
    assert row.startswith("chat ok") or row.startswith("chat client left"), row
    layers = browser.find_elements("css selector", "#map .layer")
    assert len(layers) == 4
    for layer in layers:
        assert len(layer.find_elements("css selector", "i")) == 32
        assert 0 < len(layer.find_elements("css selector", "i.on")) <= 8
    assert "hit rate" in browser.find_element("id", "hit").text
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_the_page_fits_light_dark_and_narrow(page):
    """Dark paper is dark, and nothing is wider than a telephone's screen."""
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert page().execute_script(paper) == "rgb(255, 255, 255)"
    browser = page(width=390, scheme="dark")
    assert browser.execute_script(paper) == "rgb(22, 22, 21)"
    wide, room = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= room
    chat, experts = browser.find_elements("css selector", "main section")
    assert experts.location["y"] >= chat.location["y"] + chat.size["height"]


def test_an_error_is_shown_in_the_chat(page):
    """A prompt that does not fit: the server's own sentence."""
    browser = page()
    browser.execute_script("document.getElementById('text').value = 'word '.repeat(400)")
    browser.find_element("id", "send").click()
    until(lambda: browser.find_elements("css selector", ".message.error"))
    assert "tokens" in browser.find_element("css selector", ".message.error").text
