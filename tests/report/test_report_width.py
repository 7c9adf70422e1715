"""The page in a headless browser; needs Debian's chromium and chromium-driver."""

import shutil

import pytest
from report_records import demo_records

pytestmark = pytest.mark.skipif(
    shutil.which("chromedriver") is None, reason="apt install chromium chromium-driver"
)


def test_the_strategies_table_fits_a_screen_of_1280_pixels(tmp_path):
    """All its nine columns, that of texts read too, without scrolling."""
    from selenium import webdriver

    from melinoe.report import write_report

    records = [r for r in demo_records() if r["kind"] in ("serve", "quality")]
    models = ("base", "control", "fine-tuned")
    for record in [r for r in records if r.get("strategy") in models and r["link"] is None]:
        read = {"kind": "reading", "model": record["model"], "slots": 8, "policy": "lru"}
        kept = ("transfers_per_token", "per_prompt")
        records.append(read | {name: record[name] for name in kept})
    write_report(records, tmp_path / "r.html")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.set_window_size(1280, 900)
        browser.get((tmp_path / "r.html").as_uri())
        table = browser.find_element("css selector", "table")
        assert len(table.find_elements("css selector", "th")) == 9
        wide, shown = (table.get_property(name) for name in ("scrollWidth", "clientWidth"))
        assert wide <= shown
    finally:
        browser.quit()
