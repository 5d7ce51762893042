"""The page at `/` as people meet it, in a real browser with a real engine behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import shlex
import shutil
import urllib.request

import numpy as np
import pytest
import tokenizers
from prometheus_client.parser import text_string_to_metric_families

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("openai")
from scripted_engine import ScriptedEngine, post, serving, wait_until  # noqa: E402
from tiny_engine import SETTINGS, TOKENIZER, checkpoint  # noqa: E402

from data.tokenizers import load_tokenizer  # noqa: E402
from serving import Engine  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, Debian's or Google's"),
]
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
KEY = "a secret"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LETTERS = json.dumps({"allowed_token_ids": list(range(97, 123))})
expect = playwright.expect
expect.set_options(timeout=120_000)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield found
        found.close()


@pytest.fixture(scope="module")
def engine():
    files = {**TOKENIZER.files(), "chat_template.jinja": TEMPLATE.encode()}
    sizes = {"max_model_len": 512, "num_pages": 300, "page_widths": (128,), "max_logprobs": 5}
    return Engine(checkpoint(files), dataclasses.replace(SETTINGS, **sizes))


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, api_keys=(KEY,), served_names=("tiny", "second")) as (found, _):
        yield found


@contextlib.contextmanager
def visit(browser, url, *, key=KEY, refused=(), **options):
    """A page, which may ask nobody but its server, and complain of nothing but these statuses."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(120_000)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    if key:
        page.add_init_script(f"sessionStorage.setItem('sheaf.key', {json.dumps(json.dumps(key))})")
    page.goto(url)
    yield page
    context.close()
    assert asked[0] == f"{url}/"
    assert [each for each in asked if not each.startswith((f"{url}/", "data:"))] == []
    known = [f"a status of {status}" for status in refused]
    assert [each for each in complaints if not any(part in each for part in known)] == []


def sent(page, path, act):
    """The body of the request that an act makes."""
    with page.expect_request(lambda request: request.url.endswith(path)) as caught:
        act()
    return caught.value.post_data_json


def ended(page, button):
    expect(page.locator(button)).not_to_have_text("Stop")


def texts(page, within):
    """The characters of an answer's tokens; those without characters of their own left out."""
    return "".join(page.locator(f"{within} .tokens > :not(.bare)").all_text_contents())


def whole(url, path, body):
    """What the server answers to a request without stream."""
    plain = {name: value for name, value in body.items() if not name.startswith("stream")}
    status, _, answer = post(url, path, plain, **AUTHORIZED)
    assert status == 200, answer
    return answer


def test_the_page_is_open_but_asks_for_the_key_and_forgets_it(browser, url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    with visit(browser, url, key=None, refused=(401,)) as page:
        expect(page.locator("#state")).to_have_text("needs a key")
        expect(page.locator("#api-key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("ready")
        assert page.locator("#model option").all_text_contents() == ["tiny", "second"]
        assert KEY in page.evaluate("JSON.stringify({...sessionStorage})")
        assert KEY not in page.evaluate("JSON.stringify({...localStorage})")
        page.locator("#completion-code, #chat-code").locator("visible=true").click()
        assert KEY not in page.locator("#code pre").text_content()


def test_a_completion_streams_with_its_probabilities(browser, url):
    with visit(browser, url) as page:
        page.locator("#tab-completion").click()
        for name, value in (("max_tokens", "12"), ("seed", "7"), ("temperature", "1.5")):
            page.locator(f"#{name}").fill(value)
        page.locator("#settings summary", has_text="Other").click()
        page.locator("#others").fill(LETTERS)
        page.locator("#model").select_option("second")
        page.locator("#prompt").fill("say")
        body = sent(page, TEXT, lambda: page.locator("#prompt").press("Control+Enter"))
        assert (body["model"], body["seed"], body["logprobs"]) == ("second", 7, 5)
        assert "top_p" not in body  # What nobody touched is left to the checkpoint.
        ended(page, "#run")
        choice = whole(url, TEXT, body)["choices"][0]
        assert texts(page, "#answers") == choice["text"]
        facts = page.locator(".facts").text_content()
        for fact in ("3 prompt tokens", "12 tokens", "tokens/s", "to the first", "length"):
            assert fact in facts

        shown = page.locator("#answers .token")
        for at in (0, 3, 4):  # By mouse, by mouse, by keyboard.
            if at == 4:
                shown.nth(3).focus()
                page.keyboard.press("ArrowRight")
                expect(shown.nth(4)).to_be_focused()
            else:
                shown.nth(at).hover()
            logprob = choice["logprobs"]["token_logprobs"][at]
            box = page.locator("#token")
            expect(box.locator("dd").nth(1)).to_have_text(f"{logprob:.3f}")
            likely = sorted(choice["logprobs"]["top_logprobs"][at].values(), reverse=True)
            rank = 1 + sum(other > logprob for other in likely)
            expect(box.locator("dd").nth(3)).to_have_text(str(rank) if rank <= 5 else "> 5")
            assert likely[0] == pytest.approx(log_of(box.locator("meter").first), rel=1e-3)
        page.mouse.move(2, 2)
        expect(box).to_be_hidden()

        shown.nth(3).click()  # To go on from there with what was not chosen.
        page.keyboard.press("Escape")
        expect(shown.nth(3)).to_be_focused()
        page.keyboard.press("Enter")
        token, other = next(
            (each.text_content(), each)
            for each in box.locator(".likely button").all()
            if each.text_content() in choice["logprobs"]["top_logprobs"][3]
        )
        again = sent(page, TEXT, lambda: other.press("Enter"))
        assert again == {**body, "prompt": "say" + choice["text"][:3] + token}
        ended(page, "#run")


def log_of(meter):
    return math.log(meter.evaluate("meter => meter.value"))


def test_tokens_of_any_bytes_and_the_prompt_add_up_to_the_text(browser, url):
    with visit(browser, url) as page:
        page.locator("#tab-completion").click()
        for name, value in (("max_tokens", "40"), ("seed", "3"), ("n", "3"), ("stop", "a\\n\nz")):
            page.locator(f"#{name}").fill(value)
        page.locator("#echo").check()
        page.locator("#prompt").fill("né 🌾\nof")
        body = sent(page, TEXT, page.locator("#run").click)
        assert body["stop"] == ["a\n", "z"]
        ended(page, "#run")
        for choice in whole(url, TEXT, body)["choices"]:
            assert texts(page, "#answers") == choice["text"]
            assert page.locator(".token.given").all_text_contents() == list("né 🌾\nof")
            page.get_by_label("Next answer").press("Enter")
        assert "perplexity of the prompt" in page.locator(".facts").text_content()


def test_a_token_keeps_its_text_where_a_stop_text_held_it_back(browser):
    said = "the cat and the hat and the end"
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([said] * 9, vocab_size=300, show_progress=False)
    tokenizer = load_tokenizer({"tokenizer.json": trained.to_str().encode()})
    engine = ScriptedEngine()
    engine.tokenizer = tokenizer
    ids = tokenizer.encode([said])[0].tolist()
    engine._reply = lambda request: [*ids, *[257] * 99]
    with serving(engine) as (url, _), visit(browser, url, key=None) as page:
        page.locator("#tab-completion").click()
        page.locator("#max_tokens").fill(str(len(ids)))
        page.locator("#stop").fill("nd you")
        page.locator("#prompt").fill("the")
        page.locator("#run").click()
        ended(page, "#run")
        pieces = [tokenizer.decode([token]) for token in ids]
        assert " and" in pieces
        assert page.locator("#answers .token").all_text_contents() == pieces


def test_a_chat_by_keyboard_alone(browser, url):
    with visit(browser, url) as page:
        expect(page.locator("#state")).to_have_text("ready")
        page.locator("#max_tokens").fill("6")
        page.locator("#system").fill("be")

        def go_to(selector):
            for _ in range(80):
                page.keyboard.press("Tab")
                if page.locator(selector).evaluate("each => each === document.activeElement"):
                    return
            raise AssertionError(f"Tab does not lead to {selector}")

        go_to("#message")
        page.keyboard.type("ab")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("c")
        first = sent(page, CHAT, lambda: page.keyboard.press("Enter"))
        said = [{"role": "system", "content": "be"}, {"role": "user", "content": "ab\nc"}]
        assert first["messages"] == said
        ended(page, "#send")
        answer = texts(page, ".assistant")
        page.keyboard.type("more")
        second = sent(page, CHAT, lambda: page.keyboard.press("Enter"))
        more = {"role": "user", "content": "more"}
        assert second["messages"] == [*said, {"role": "assistant", "content": answer}, more]
        ended(page, "#send")

        go_to(".turn:last-child button:has-text('Retry')")
        assert sent(page, CHAT, lambda: page.keyboard.press("Enter")) == second
        ended(page, "#send")
        expect(page.locator(".pager")).to_contain_text("2 / 2")
        go_to(".turn:first-child button:has-text('Edit')")
        page.keyboard.press("Enter")
        page.keyboard.press("Control+a")
        page.keyboard.type("new")
        edited = sent(page, CHAT, lambda: page.keyboard.press("Control+Enter"))
        assert edited["messages"] == [said[0], {"role": "user", "content": "new"}]
        ended(page, "#send")
        page.reload()  # Nothing that was written is lost.
        assert page.locator(".said").all_text_contents() == ["new"]


def test_stop_ends_the_work_on_the_server(browser, url, engine):
    before = engine.stats()
    with visit(browser, url) as page:
        page.locator("#tab-completion").click()
        page.locator("#settings summary", has_text="Other").click()
        page.locator("#others").fill('{"ignore_eos": true}')
        page.locator("#max_tokens").fill("480")
        page.locator("#n").fill("4")
        page.locator("#prompt").fill("go on")
        page.locator("#run").click()
        expect(page.locator("#answers .token").nth(2)).to_be_attached()
        assert engine.stats().running == 4
        page.keyboard.press("Escape")
        ended(page, "#run")
        expect(page.locator(".facts")).to_contain_text("ended by hand")
        wait_until(lambda: engine.stats().running == 0)
        assert engine.stats().finished["abort"] == before.finished.get("abort", 0) + 4
        assert engine.stats().pages_free == engine.stats().pages_total


def test_errors_are_told_in_the_words_of_the_server(browser, url):
    with visit(browser, url, refused=(400,)) as page:
        page.locator("#temperature").fill("9")
        page.locator("#message").fill("a")
        body = sent(page, CHAT, page.locator("#send").click)
        _, _, told = post(url, CHAT, body, **AUTHORIZED)
        expect(page.get_by_role("alert")).to_have_text(
            f"400 invalid_value: {told['error']['message']}"
        )
        page.locator("#reset").click()
        assert page.locator("#temperature").input_value() == ""
        page.locator("#settings summary", has_text="Structured").click()
        page.locator("#schema").fill("{")
        page.locator(".turn button", has_text="Retry").click()
        expect(page.get_by_role("alert")).to_contain_text("The JSON schema is not JSON")


def test_answers_have_the_form_of_a_json_schema(browser, url):
    pytest.importorskip("llguidance")
    form = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    form |= {"required": ["n"], "additionalProperties": False}
    with visit(browser, url, refused=(400,)) as page:
        page.locator("#settings summary", has_text="Structured").click()
        page.locator("#schema").fill(json.dumps(form))
        page.locator("#seed").fill("5")
        page.locator("#message").fill("a")
        body = sent(page, CHAT, page.locator("#send").click)
        assert body["response_format"]["json_schema"]["schema"] == form
        ended(page, "#send")
        assert json.loads(texts(page, ".assistant"))["n"] in range(10)
        page.locator("#schema").fill('{"type": "number", "multipleOf": "much"}')
        page.locator("#message").fill("b")
        page.locator("#send").click()
        expect(page.get_by_role("alert")).to_contain_text("response_format has a json that cannot")


def test_requests_are_shown_as_code_that_runs(browser, url, monkeypatch):
    monkeypatch.setenv("SHEAF_API_KEY", KEY)
    with visit(browser, url) as page:
        page.locator("#tab-completion").click()
        for name, value in (("max_tokens", "8"), ("seed", "5"), ("top_k", "9")):
            page.locator(f"#{name}").fill(value)
        page.locator("#prompt").fill('it\'s "so" \\ $HOME\n')
        page.locator("#completion-code").click()
        code = {}
        for name in ("JSON", "curl", "Python"):
            page.get_by_role("button", name=name, exact=True).click()
            code[name] = page.locator("#code pre").text_content()
        page.keyboard.press("Escape")
        body = sent(page, TEXT, page.locator("#run").click)
        ended(page, "#run")
    assert json.loads(code["JSON"]) == body
    words = shlex.split(code["curl"].replace("\\\n", " "))
    assert (words[2], json.loads(words[-1])) == (url + TEXT, body)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code["Python"], "page", "exec"), {})
    assert output.getvalue() == whole(url, TEXT, body)["choices"][0]["text"]


def test_metrics_are_those_of_the_server(browser, url):
    with visit(browser, url) as page:
        page.locator("#tab-completion").click()
        page.locator("#max_tokens").fill("30")
        page.locator("#prompt").fill("count")
        page.locator("#run").click()
        ended(page, "#run")
        page.locator("#window").select_option("all")
        request = urllib.request.Request(f"{url}/metrics", headers=AUTHORIZED)
        with urllib.request.urlopen(request, timeout=20) as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
        (generated,) = families["sheaf:generation_tokens"].samples
        row = page.locator("#totals tr", has_text="Tokens generated").locator("td")
        expect(row).to_have_text(f"{generated.value:,.0f}")
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in families["sheaf:time_to_first_token_seconds"].samples
            if sample.name.endswith("_bucket")
        ]
        edges, counts = np.array([(0, 0), *buckets]).T
        shown = page.locator("#latencies tr").first.locator("td").all()
        for cell, q in zip(shown, (0.5, 0.9, 0.99), strict=True):
            wanted = quantile(q, edges, counts)
            assert in_seconds(cell.text_content()) == pytest.approx(wanted, rel=0.02)
        assert page.locator(".tile .stroke").first.get_attribute("d").startswith("M")


def quantile(q, edges, counts):
    """As Prometheus' documentation of `histogram_quantile` has it: linear within a bucket."""
    at = np.searchsorted(counts, q * counts[-1])
    within = (q * counts[-1] - counts[at - 1]) / (counts[at] - counts[at - 1])
    return edges[at - 1] + within * (edges[at] - edges[at - 1])


def in_seconds(text):
    value, unit = text.split()
    return float(value) / {"ms": 1000, "s": 1}[unit]


def test_what_a_model_writes_is_text_and_without_a_template_there_is_no_chat(browser):
    script = {"mark": "<img src=x onerror=alert(1)><b>bold</b>"}
    with (
        serving(ScriptedEngine(script, template=None)) as (url, _),
        visit(browser, url, key=None) as page,
    ):
        expect(page.locator("#tab-completion")).to_have_attribute("aria-selected", "true")
        page.locator("#max_tokens").fill("39")
        page.locator("#prompt").fill("mark")
        page.locator("#run").click()
        ended(page, "#run")
        assert texts(page, "#answers") == script["mark"]
        assert page.locator("#answers :is(img, b:not(.facts b))").count() == 0
        page.locator("#tab-chat").click()
        expect(page.locator("#chat")).to_contain_text("has no chat template")
        expect(page.locator("#send")).to_be_hidden()


CONTRAST = """selector => {
  const light = (text) => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((each) => each / 255);
    const [r, g, b] = parts.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const style = (element) => getComputedStyle(element);
  const element = document.querySelector(selector);
  let ground = element;
  while (style(ground).backgroundColor.endsWith(", 0)")) ground = ground.parentElement;
  const [a, b] = [style(element).color, style(ground).backgroundColor].map(light);
  return Math.max(a, b) / Math.min(a, b);
}"""
NAMELESS = """() => {
  const all = [...document.querySelectorAll("button, input, select, textarea")];
  const named = (each) => each.ariaLabel || each.labels?.length || each.textContent.trim();
  return all.filter((each) => !named(each) && !each.ariaHidden).map((each) => each.outerHTML);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_both_schemes_and_on_small_screens(browser, url, scheme, tmp_path):
    small = {"width": 360, "height": 640}
    with visit(browser, url, color_scheme=scheme) as page:
        expect(page.locator("#state")).to_have_text("ready")
        page.screenshot(path=tmp_path / f"{scheme}.png")
        for selector in ("body", "#state", "#send", "#tab-completion", "#tab-chat", ".tile .label"):
            assert page.evaluate(CONTRAST, selector) >= 4.5, selector
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") < "rgb(200"
        assert dark == (scheme == "dark")
        assert page.evaluate(NAMELESS) == []
        page.set_viewport_size(small)
        expect(page.locator("#settings")).to_be_hidden()
        for side in ("settings", "metrics"):
            page.locator(f"#open-{side}").click()
            page.screenshot(path=tmp_path / f"{scheme}_{side}.png")
            page.keyboard.press("Escape")
            expect(page.locator(f"#open-{side}")).to_be_focused()
        width = page.evaluate("document.scrollingElement.scrollWidth")
        assert width == small["width"]
        other = "dark" if scheme == "light" else "light"
        while page.locator("#theme").text_content().strip().lower() != other:
            page.locator("#theme").click()
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") < "rgb(200"
        ) != dark
