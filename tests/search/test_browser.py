"""The page in a real browser: Debian's Chromium, headless. Screenshots stay in `ci_output/`.

Run by `make test-browser`; pytest leaves it out by default.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from helpers.runner import ENVIRONMENT, ROOT
from helpers.searching import png_header

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
SHOTS = ROOT / "ci_output"
MARKUP = '<img src=x onerror="document.title=1"><script>document.title=1</script> **red** :red[c] make it'
MOST = 10_000  # milliseconds to wait; on a busy machine the first answer is late


@pytest.fixture(scope="module")
def address(data, checkpoint, tmp_path_factory):
    """A running `app.py` after what `make demo` leaves: data, a run, no index."""
    models = tmp_path_factory.mktemp("models")
    saved = models / "clip_finetuned_on_cirr_tiny" / "saved_models"
    saved.mkdir(parents=True)
    shutil.copy(checkpoint, saved / "tuned_clip_arithmetic.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    command = [sys.executable, ROOT / "src/app.py", "--port", port]
    command += ["--data-path", data, "--models-path", models]
    with log.open("w") as file:
        server = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=ENVIRONMENT)
        try:
            for _ in range(600):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            else:
                pytest.fail(log.read_text())
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)
    text = log.read_text()
    assert "36 pictures (36 new" in text
    assert "Traceback" not in text, text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM, "chromium is not here: apt-get install chromium, or set CHROMIUM to its path"
    SHOTS.mkdir(exist_ok=True)
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    if os.getuid() == 0:  # Chromium's sandbox does not work for root
        flags.append("--no-sandbox")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture(params=[1280, 390])
def page(browser, address, request):
    page = browser.new_page(viewport={"width": request.param, "height": 1000})
    page.set_default_timeout(MOST)
    asked = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto(address)
    page.get_by_role("button", name="Try it").first.wait_for()
    yield page
    # Nothing comes from elsewhere, and nothing is wider than the window.
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def shoot(page, name):
    """The whole page: Streamlit scrolls inside the window, so the window is made as high as the page."""
    size = page.viewport_size
    height = page.evaluate("document.querySelector('.stMainBlockContainer').scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": min(height + 50, 4000)})
    page.wait_for_timeout(300)
    page.screenshot(path=SHOTS / f"{name}-{size['width']}.png")
    page.set_viewport_size(size)


def results(page, kind="on"):
    """Rank and score of each result, once the page has come to rest."""
    page.locator(f".st-key-result-{kind}-0").wait_for()
    settle(page)
    lines = page.locator(f".st-key-result-{kind}s").inner_text().splitlines()
    return [line for line in lines if re.fullmatch(r"\d+: -?\d\.\d{4}", line)]


def settle(page):
    page.wait_for_function("!document.querySelector('[data-test-script-state=running]')")
    page.wait_for_timeout(150)
    page.wait_for_function("!document.querySelector('[data-test-script-state=running]')")


def ask(page, text):
    settle(page)
    field = page.get_by_label("What should change?")
    field.fill(text)
    field.press("Enter")


def edit_result(page, number):
    page.locator(f".st-key-result-on-{number}").get_by_role("button", name="Edit this").click()


def upload(page, name, content):
    page.get_by_role("tab", name="Upload").click()
    page.locator("input[type=file]").set_input_files(
        {"name": name, "mimeType": "image/png", "buffer": content}
    )


def test_a_ready_query_a_chain_of_edits_and_the_way_back(page):
    shoot(page, "start")
    page.get_by_role("button", name="Try it").first.click()
    first = results(page)
    assert len(first) == 8
    edit_result(page, 1)
    page.get_by_text("Say what should change").wait_for()
    ask(page, "make the small circle red")
    second = results(page)
    edit_result(page, 0)
    page.get_by_role("button", name="Go back here").nth(1).wait_for()
    ask(page, "add a green star")
    third = results(page)
    assert len({tuple(found) for found in (first, second, third)}) == 3
    shoot(page, "chain")
    page.get_by_role("button", name="Back", exact=True).click()
    page.wait_for_function("document.querySelectorAll('[class*=st-key-step-][class*=-go]').length === 1")
    assert page.get_by_label("What should change?").input_value() == "make the small circle red"
    assert results(page) == second
    page.get_by_role("button", name="Go back here").click()
    page.get_by_role("button", name="Go back here").wait_for(state="detached")
    assert results(page) == first


def test_on_and_off_side_by_side_and_the_map(page):
    page.get_by_role("button", name="Try it").nth(2).click()
    on = results(page)
    page.get_by_text("Compare with the edit left out").click()
    off = results(page, "off")
    assert results(page) == on != off
    assert page.get_by_text("Both sides are the same trained weights").is_visible()
    shoot(page, "compare")
    # Without strength both sides are the same; with another opacity the results stay.
    strength = page.locator(".st-key-strength").get_by_role("slider")
    strength.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.st-key-strength').innerText.includes('0.00')")
    page.wait_for_timeout(500)
    assert results(page) == results(page, "off") == off
    picture = page.get_by_role("img", name="the reference")
    before = picture.get_attribute("src")
    opacity = page.locator(".st-key-opacity").get_by_role("slider")
    opacity.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "old => document.querySelector('img[alt=\"the reference\"]').getAttribute('src') !== old", arg=before
    )
    assert results(page) == off


def test_an_upload_a_broken_one_and_a_huge_one(page, data):
    good = next((data / "cirr_dataset/test1").iterdir()).read_bytes()
    upload(page, "own.png", good)
    page.get_by_text("your picture").wait_for()
    ask(page, "make the small circle red")
    found = results(page)
    assert len(found) == 8
    for name, content, reason in (
        ("broken.png", good[:400], "no picture that can be read"),
        ("huge.png", png_header(60_000, 60_000), "too large"),
        ("large.png", png_header(7000, 7000), "7000 x 7000 pixels; the most is 40 million"),
    ):
        upload(page, name, content)
        page.locator(".st-key-problem").get_by_text(reason).wait_for()
        assert results(page) == found
    shoot(page, "refused")
    upload(page, "heavy.png", good + bytes(10 * 2**20))
    page.get_by_text(re.compile("must be 10.?0?MB or smaller")).wait_for()
    assert results(page) == found


def test_markup_in_a_caption_stays_text(page):
    page.get_by_role("button", name="Try it").first.click()
    results(page)
    ask(page, MARKUP)
    results(page)
    edit_result(page, 0)
    page.get_by_role("button", name="Go back here").wait_for()
    shown = page.locator(".st-key-step-0").inner_text()
    assert '<img src=x onerror="document.title=1">' in shown
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "Search pictures"
    shoot(page, "markup")


def test_names_in_the_address_stay_in_the_index(browser, address, data):
    page = browser.new_page()
    page.set_default_timeout(MOST)
    page.goto(f"{address}/?reference=../../../edits.val.json&text=make+it+red")
    page.get_by_text("edits.val.json is not in the index").wait_for()
    name = sorted(path.name for path in (data / "cirr_dataset/dev").iterdir())[0]
    page.goto(f"{address}/?reference={name}&text=make+it+red")
    assert len(results(page)) == 8
    for path in ("/media/../../etc/passwd", "/app/static/../../etc/passwd", "/..%2f..%2fetc/passwd"):
        answer = page.request.get(address + path)
        assert "root:" not in answer.text()
    page.close()
