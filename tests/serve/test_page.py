"""The chat page in a real browser."""

import json
import re
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium

from mptbook.infer.text import TextStream
from mptbook.serve.server import PAGE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
SAID = "document.querySelector('#said').value"
LAST = "[...document.querySelectorAll('.turn.assistant p')].at(-1)?.textContent"
IDLE = "document.querySelector('#stop').disabled"
STATUS = "document.querySelector('#status').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as one:
        yield one


def ready(page):
    page.until("document.title === 'cat'")
    page.until("document.activeElement === document.querySelector('#said')")
    return page


def slowed(running, monkeypatch, seconds=0.03):
    plain = running.served.engine.slots.decode
    monkeypatch.setattr(
        running.served.engine.slots, "decode", lambda *given: time.sleep(seconds) or plain(*given)
    )


def writes(monkeypatch, text):
    """Have the model write a text, again and again, whatever its tokens are."""
    monkeypatch.setattr(TextStream, "add", lambda self, token: text)
    monkeypatch.setattr(TextStream, "finish", lambda self: "")


def test_a_chat_by_keyboard_streams_and_remembers(browser, running, monkeypatch):
    asked = []
    plain = running.served.chat
    monkeypatch.setattr(
        running.served, "chat", lambda body: asked.append(body) or plain(body), raising=True
    )
    slowed(running, monkeypatch, 0.1)
    writes(monkeypatch, "sat ")  # what comes back must be short as tokens
    page = ready(browser.open(running.url))
    page.value("document.querySelector('#max_tokens').value = 12")
    page.type("the cat")
    page.press("Enter", modifiers=8)  # a new line, not sent
    page.type("sat")
    page.press("Enter")
    page.until(f"({LAST})?.length > 0")
    assert not page.value(IDLE)  # text is there while more is written
    first = page.value(LAST)
    page.until(IDLE)
    assert page.value(LAST).startswith(first)
    assert len(page.value(LAST)) > len(first)
    assert page.value(STATUS) == "The tokens are used up."
    answer = page.value(LAST)
    page.until("document.activeElement === document.querySelector('#said')")
    page.type("why")
    page.press("Enter")
    page.until("document.querySelectorAll('.turn').length === 4")
    page.until(IDLE)
    turns = [(turn.role, turn.content) for turn in asked[1].messages]
    assert turns == [("user", "the cat\nsat"), ("assistant", answer), ("user", "why")]
    assert asked[1].max_tokens == 12
    assert answer == "sat " * 12
    assert page.complaints() == []


def test_stop_ends_writing_at_the_server_too(browser, running, monkeypatch):
    slowed(running, monkeypatch)
    counts = running.served.engine.counts
    before = counts.finished.get("cancelled", 0)
    page = ready(browser.open(running.url))
    for stop in (lambda: page.click("#stop"), lambda: page.press("Escape")):
        page.type("the cat")
        page.press("Enter")
        page.until(f"({LAST})?.length > 0")
        stop()
        page.until(IDLE)
        assert page.value(STATUS) == "Stopped."
        assert page.value(LAST)  # what was written stays
        page.click("#fresh")
        assert page.value("document.querySelectorAll('.turn').length") == 0
    end = time.monotonic() + 5
    while counts.finished.get("cancelled", 0) < before + 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert counts.finished["cancelled"] == before + 2


def test_what_the_model_writes_is_text_even_if_it_looks_like_html(browser, running, monkeypatch):
    evil = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>&amp;"
    writes(monkeypatch, evil)
    page = ready(browser.open(running.url))
    page.value("document.querySelector('#max_tokens').value = 2")
    page.type("<b>the</b>")
    page.press("Enter")
    page.until(f"{IDLE} && ({LAST})?.length > 0")
    assert page.value(LAST) == evil * 2
    assert page.value("document.querySelectorAll('#talk img, #talk script, #talk b').length") == 0
    assert page.value("document.title") == "cat"


def test_scripts_that_are_not_the_page_s_do_not_run(browser, running):
    page = ready(browser.open(running.url))
    page.value(
        "(() => { const own = document.createElement('script');"
        " own.textContent = 'document.title = \"run\"'; document.body.append(own) })()"
    )
    assert page.value("document.title") == "cat"
    (complaint,) = page.complaints()
    assert "Content Security Policy" in complaint


def test_settings_are_sent_and_kept_but_the_key_only_in_its_tab(browser, serving):
    with serving(key="s3cret") as running:
        asked = []
        plain = running.served.chat
        running.served.chat = lambda body: asked.append(body) or plain(body)
        page = browser.open(running.url)
        page.until(f"{STATUS}.includes('asks for a key')")
        page.until("document.activeElement === document.querySelector('#key')")
        page.type("s3cret")
        page.press("Tab")
        ready(page)
        for name, value in {"temperature": "0", "top_p": "0.5", "max_tokens": "3"}.items():
            page.value(f"document.querySelector('#{name}').value = '{value}'")
        page.value("document.querySelector('#system').focus()")
        page.type("A dog")
        page.value("document.querySelector('#said').focus()")
        page.type("the cat")
        page.press("Enter")
        page.until(f"{IDLE} && ({LAST})?.length > 0")
        (body,) = asked
        assert (body.temperature, body.top_p, body.max_tokens) == (0, 0.5, 3)
        assert [turn.content for turn in body.messages] == ["A dog", "the cat"]
        kept = json.loads(page.value("JSON.stringify(localStorage)"))
        assert kept == {"temperature": "0", "top_p": "0.5", "max_tokens": "3", "system": "A dog"}
        page.command("Page.reload")
        ready(page)  # with the key of the tab
        assert page.value("document.querySelector('#system').value") == "A dog"


def test_an_error_is_shown_and_the_message_is_not_lost(browser, running):
    page = ready(browser.open(running.url))
    page.type("the <|im_end|>")
    page.press("Enter")
    page.until(f"{STATUS}.includes('spells <|im_end|>')")
    assert page.value(SAID) == "the <|im_end|>"
    assert page.value("document.querySelectorAll('.turn').length") == 0
    page.value("document.querySelector('#temperature').value = 3")
    page.press("Enter")
    page.until(f"{STATUS} === 'Temperature is out of its range.'")


def test_a_model_without_a_template_continues_a_text(browser, serving):
    with serving(template=None) as running:
        page = ready(browser.open(running.url))
        assert page.value("document.querySelector('#send').textContent") == "Continue"
        assert page.value("document.querySelector('#talk').offsetHeight") == 0
        for name, value in {"temperature": "0", "max_tokens": "9"}.items():
            page.value(f"document.querySelector('#{name}').value = '{value}'")
        page.type("the cat")
        page.press("Enter", modifiers=2)
        page.until(f"{IDLE} && {SAID}.length > 7")
        found = running.complete("the cat", temperature=0, max_tokens=9, top_p=0.95).json()
        # A text field has no carriage returns and no characters without a meaning of their own.
        expected = "the cat" + found["choices"][0]["text"].replace("\r", "\n")
        assert page.value(SAID) == expected


def test_a_template_of_one_turn_is_given_one_turn(browser, serving):
    with serving(template="instruct") as running:
        page = ready(browser.open(running.url))
        page.value("document.querySelector('#max_tokens').value = 3")
        for n in (2, 4):
            page.type("the cat")
            page.press("Enter")
            page.until(f"document.querySelectorAll('.turn').length === {n} && {IDLE}")
            assert page.value("document.querySelector('#status').className") == ""


def contrast(page, selector):
    """Of the text of an element to what is behind it, as WCAG counts it."""
    colours = page.value(
        f"(() => {{ const own = document.querySelector({selector!r}); let behind = own, back;"
        " do { back = getComputedStyle(behind).backgroundColor; behind = behind.parentElement }"
        " while (back === 'rgba(0, 0, 0, 0)' && behind);"
        " return [getComputedStyle(own).color, back] })()"
    )

    def luminance(colour):
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 900])
def test_it_can_be_read_at_the_width_of_a_phone_in_light_and_in_the_dark(
    browser, running, monkeypatch, scheme, width, tmp_path
):
    writes(monkeypatch, "A long word: " + "ab" * 60 + ". ")
    page = ready(browser.open(running.url, width=width, height=800, scheme=scheme))
    page.value("document.querySelector('#max_tokens').value = 5")
    page.type("the cat " * 12)
    page.press("Enter")
    page.until(f"{IDLE} && ({LAST})?.length > 9")
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.documentElement.scrollHeight") <= 800  # the field is in sight
    for place in (".turn.user p", ".turn.assistant p", ".turn h2", "#status", "#hint", "#send"):
        assert contrast(page, place) >= 4.5, place
    page.click("summary")
    assert page.value("document.querySelector('#settings').open")
    assert page.value("document.documentElement.scrollWidth") <= width
    heights = "[...document.querySelectorAll('button')].map((b) => b.offsetHeight)"
    assert min(page.value(heights)) >= 44
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.picture(tmp_path / f"{scheme}-{width}.png")


def test_all_that_can_be_used_has_a_name_and_a_place_in_the_order_of_tab(browser, running):
    page = ready(browser.open(running.url))
    page.click("summary")
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    usable = ("button", "textbox", "spinbutton", "log", "status", "DisclosureTriangle")
    # Some versions of Chromium end the name of a field in its label with the label's space.
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in usable
    ]
    names = {name for role, name in found if role != "status"}
    assert "" not in names
    assert {"Message", "Temperature", "Top p", "Tokens at most", "Key", "Send", "Stop"} <= names
    assert {"System message", "Conversation", "New chat", "Settings"} <= names
    page.value("document.querySelector('#fresh').focus()")
    seen = ["fresh"]
    for _ in range(10):
        page.press("Tab")
        seen.append(page.value("document.activeElement.id || document.activeElement.tagName"))
    order = ["fresh", "SUMMARY", "temperature", "top_p", "max_tokens", "key", "system", "talk"]
    assert [place for place in seen if place in (*order, "said", "send")] == [
        *order, "said", "send",
    ]  # fmt: skip
    assert page.complaints() == []


def test_the_page_takes_nothing_from_elsewhere():
    for file in Path(PAGE).iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]|innerHTML|insertAdjacentHTML|eval\(", text)
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]* src=)", text)
