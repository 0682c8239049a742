"""The chat page in a real browser: it streams, shows what was said as text, and says what went wrong."""

import shutil
from collections.abc import Iterator

import pytest
from qlora_runtime import Sampling
from qlora_runtime.generate import generate
from qlora_runtime.server.page import read_page

from .serving import Server, serving

pytestmark = pytest.mark.slow
EVIL = "<img src=x onerror=\"document.title='taken'\"><b>Where?</b>"


def test_the_page_reaches_nothing_outside_itself():
    text, policy = read_page()
    assert "http://" not in text and "https://" not in text and "src=" not in text
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2


@pytest.fixture(scope="module")
def browser() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=900,700",
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def server(pristine_bundle) -> Iterator[Server]:
    with serving(pristine_bundle, "--name", "tiny", "--api-key", "secret") as found:
        yield found


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, 0.02).until(lambda _: condition())


def messages(browser, kind: str) -> list[str]:
    boxes = browser.find_elements("css selector", f".message.{kind}")
    return [box.get_property("textContent") for box in boxes]


def say(browser, text: str) -> None:
    browser.find_element("id", "text").send_keys(text + "\n")
    wait(browser, lambda: browser.find_element("id", "send").text == "Send" and messages(browser, "user"))


def settings(browser, **values: str) -> None:
    browser.execute_script("document.getElementById('settings').open = true")
    for name, value in values.items():
        field = browser.find_element("id", name)
        field.clear()
        field.send_keys(value)


def test_a_chat_in_a_browser(browser, server, bundle):
    browser.get(f"http://127.0.0.1:{server.port}/")
    say(browser, "Where?")
    assert ["key is missing or wrong" in told for told in messages(browser, "error")] == [True]
    browser.find_element("id", "anew").click()

    settings(browser, key="secret", tokens="12")
    turns = [{"role": "user", "content": EVIL}]
    first = generate(bundle, turns, Sampling(max_new_tokens=12)).text
    say(browser, EVIL)
    wait(browser, lambda: "tokens" in browser.find_element("id", "usage").text)
    assert messages(browser, "user") == [EVIL]
    assert messages(browser, "assistant") == [first]
    assert browser.title == "qlora-runtime" and not browser.find_elements("css selector", "main img, main b")

    browser.find_element("id", "anew").click()
    assert messages(browser, "user") == []
    settings(browser, system="Be kind.", tokens="6")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where?"}]
    second = generate(bundle, turns, Sampling(max_new_tokens=6)).text
    turns += [{"role": "assistant", "content": second}, {"role": "user", "content": "Why?"}]
    third = generate(bundle, turns, Sampling(max_new_tokens=6)).text
    say(browser, "Where?")
    say(browser, "Why?")
    assert messages(browser, "assistant") == [second, third]
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # Before the key was given: the list of models, and the first message. No refused resource, no script's error.
    assert ["401" in message for message in severe] == [True, True]


def test_the_answer_appears_piece_by_piece(browser, server):
    browser.get(f"http://127.0.0.1:{server.port}/")
    settings(browser, key="secret", tokens="60")
    browser.execute_script(
        "window.seen = new Set();"
        "new MutationObserver(() => { const box = document.querySelector('.message.assistant');"
        " if (box) window.seen.add(box.textContent.length); })"
        ".observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true});"
    )
    say(browser, "Where?")
    assert len(browser.execute_script("return [...window.seen]")) > 3
    server.wait_until_idle()
