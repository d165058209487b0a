"""The page of `minimuse app` in a real browser, and eight programs at once: the tests start it as a user does.

The browser is Debian's `chromium`, what CHROMIUM names, or Playwright's own; without one the tests skip. Nothing may
leave this machine: the server ends if it asks for anything elsewhere, and all that the page asks for is looked at.
"""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, giant_png
from PIL import Image

from minimuse import cli
from minimuse.muse import Muse
from minimuse.pictures import settings_of

gradio = pytest.importorskip("gradio", reason="the extra `app` is not installed")
pytestmark = pytest.mark.slow
A, B = "a red cube", "a blue ball"
WAIT = 120_000  # ms: a loaded machine is slow

# What `minimuse app` runs under: whatever it asks for beyond this machine, telemetry included, ends it at once.
GUARD = """
import os, socket, sys
connect, resolve = socket.socket.connect, socket.getaddrinfo
def local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return host is None or host in ("", "localhost", "0.0.0.0", "::1") or host.startswith("127.")
def checked(host):
    if not local(host):
        print("IT WENT OUT TO", host, flush=True)
        os._exit(77)
def guarded_connect(self, address):
    if isinstance(address, tuple):
        checked(address[0])
    return connect(self, address)
def guarded_resolve(host, *args, **kwargs):
    checked(host)
    return resolve(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_resolve
"""
COMMAND = """
from minimuse.cli import main
sys.exit(main(sys.argv[1:]))
"""


def memory(pid: int, what: str = "VmRSS") -> float:
    """MB that a process holds now (VmRSS) or held at most (VmHWM); 0 where there is no /proc."""
    path = Path(f"/proc/{pid}/status")
    return int(re.search(rf"{what}:\s+(\d+)", path.read_text())[1]) / 1000 if path.exists() else 0.0


class Server:
    def __init__(self, folder: Path, log: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        words = ["app", "--checkpoint", str(folder), "--port", str(port), "--device", "cpu"]
        self.log, self.url = log, f"http://127.0.0.1:{port}/"
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}  # it would silence telemetry too
        env |= {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(log.parent / "gradio"), "PYTHONPATH": str(ROOT)}
        with log.open("w") as out:
            command = [sys.executable, "-c", GUARD + COMMAND, *words]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)

    def wait(self) -> None:
        for _ in range(3000):
            if self.url in self.log.read_text():
                return
            assert self.process.poll() is None, f"it ended: {self.log.read_text()}"
            time.sleep(0.2)
        pytest.fail(f"it did not start: {self.log.read_text()}")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the server has: sums in another order may round to another token, and "the same pixels" are compared here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tiny_muse, tmp_path_factory):
    return tiny_muse.save_pretrained(tmp_path_factory.mktemp("app") / "tiny")


@pytest.fixture(scope="module")
def muse(folder):
    return Muse.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """`minimuse app`, as a user starts it. It must not end, go out, or print a traceback of ours."""
    server = Server(folder, tmp_path_factory.mktemp("server") / "log.txt")
    try:
        server.wait()
        yield server
        assert server.process.poll() is None, f"it ended: {server.log.read_text()}"
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)
    assert not re.search(r"minimuse[/\\]app\.py", server.log.read_text()), (
        f"a traceback of ours: {server.log.read_text()}"
    )


def browser_path(playwright) -> str:
    named = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome"]
    found = [path for name in named if name and (path := shutil.which(name))]
    found += [path for path in [playwright.chromium.executable_path] if Path(path).exists()]
    if not found:
        pytest.skip("no browser here: apt-get install chromium, or playwright install chromium")
    return found[0]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--enable-unsafe-swiftshader"]  # root in a container; WebGL without a GPU
        browser = playwright.chromium.launch(executable_path=browser_path(playwright), args=arguments)
        yield browser
        browser.close()


def opened(browser, server):
    """-> the page in a tab of its own, and a list that grows by every address that it asks for."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(WAIT)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    return page, asked


def elsewhere(asked: list[str], server: Server) -> list[str]:
    """Of what a page asked for, the addresses that are not the server's own."""
    return [url for url in asked if not url.removeprefix("blob:").startswith((server.url, "data:"))]


@pytest.fixture
def page(browser, server):
    """The page. All that it asks for must come from the server itself."""
    page, asked = opened(browser, server)
    yield page
    text = page.inner_text("body")
    page.context.close()
    assert not elsewhere(asked, server), f"the page asked elsewhere: {elsewhere(asked, server)}"
    assert len(asked) > 10, f"the requests were not seen: {asked}"
    assert "Traceback" not in text, f"a traceback is on the page: {text}"


WATCH = """() => {
    window.told = []; window.states = [];
    const add = (list, x) => { if (x && x !== list.at(-1)) list.push(x) };
    const look = () => {
        add(window.told, document.querySelector('#status').innerText.trim());
        add(window.states, document.querySelector('#picture img')?.src);
    };
    window.eye?.disconnect();
    window.eye = new MutationObserver(look);
    window.eye.observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
}"""


def press(page, name: str) -> str:
    """Press a button that draws, and wait -> the sentence at its end. The page then knows `told` and `states`."""
    page.evaluate(WATCH)
    page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_function("() => /^(Done in|Nothing was drawn)/.test(window.told.at(-1) || '')")
    return page.evaluate("window.told.at(-1)")


def fetch(url: str) -> Image.Image:
    with urllib.request.urlopen(url) as answer:
        image = Image.open(io.BytesIO(answer.read()))
    image.load()
    return image


def picture(page, of: str = "picture") -> Image.Image:
    """The picture as a user saves it, by its download button."""
    page.wait_for_function(f"() => document.querySelector('#{of} img')?.complete")
    return fetch(page.locator(f"#{of} a[download]").get_attribute("href"))


def same(one: Image.Image, two: Image.Image) -> bool:
    return one.size == two.size and one.convert("RGB").tobytes() == two.convert("RGB").tobytes()


def upload(page, path: Path) -> None:
    """Load a picture to edit, as the button of that name does."""
    page.get_by_role("tab", name="Edit").click()
    page.locator("input[type=file]").first.set_input_files(path)


def paint(page, x0: float, x1: float, y: float) -> None:
    """A stroke over the picture to edit; shares of its side."""
    box, zoom = page.locator("#canvas canvas").first.bounding_box(), page.locator("#canvas").inner_text()
    side = 384 * int(re.search(r"(\d+)%", zoom)[1]) / 100
    at = [
        (box["x"] + box["width"] / 2 + (x - 0.5) * side, box["y"] + box["height"] / 2 + (y - 0.5) * side)
        for x in (x0, x1)
    ]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=12)
    page.mouse.up()


# --- the guards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("going", "where"),
    [
        ("import http.client; http.client.HTTPSConnection('elsewhere.invalid').connect()", "elsewhere.invalid"),
        ("socket.socket().connect(('192.0.2.1', 80))", "192.0.2.1"),
    ],
)
def test_a_server_that_asks_elsewhere_is_caught(going, where):
    done = subprocess.run([sys.executable, "-c", GUARD + going], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (77, f"IT WENT OUT TO {where}\n"), f"{done}"


def test_a_page_that_asks_elsewhere_is_caught(browser, server):
    page, asked = opened(browser, server)
    assert not elsewhere(asked, server), "so far it has not"
    page.evaluate("fetch('http://elsewhere.invalid/font.woff').catch(() => 0)")
    page.context.close()
    assert elsewhere(asked, server) == ["http://elsewhere.invalid/font.woff"], f"{asked}"


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_a_prompt_streams_and_gives_its_picture(page, muse, folder, tmp_path, monkeypatch, capsys):
    page.get_by_label("Prompt").fill(B)
    page.get_by_label("Seed").fill("7")
    assert press(page, "Draw").startswith("Done in 24 steps, seed 7"), page.evaluate("window.told")
    made = picture(page)
    assert same(made, muse.generate(B, seed=7)[0]), "the page draws what the library draws"
    states, told = page.evaluate("window.states"), page.evaluate("window.told")
    assert len(set(states)) >= 4, f"three states on the way, and the picture: {len(set(states))}"
    assert len({fetch(url).tobytes() for url in states[:3]}) == 3, "they are different pictures"
    assert [t for t in told if t.startswith("Base model, step")], f"{told}"
    assert [t for t in told if t.startswith("Super-resolution, step")], f"{told}"
    settings = settings_of(made)
    same_call = settings_of(muse.generate(B, seed=7)[0])
    assert settings == same_call, f"it notes what the library notes, no control that was left alone: {settings}"
    assert settings_of(picture(page, "film")) == settings, "the film holds the same settings"

    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(
        urllib.request.urlopen(page.locator("#picture a[download]").get_attribute("href")).read()
    )
    words = ["generate", "--like", "image.png", "--out", "again.png", "--model", str(folder), "--device", "cpu"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert same(Image.open("again.png"), made), "minimuse generate --like draws the same pixels"


def test_the_dials_reach_the_sampler(page, muse):
    page.get_by_text("Decoding settings").click()
    page.get_by_label("Negative prompt").fill(B)
    page.get_by_label("number input for Steps of the base model").fill("3")
    page.get_by_label("number input for Steps of super-resolution").fill("2")
    page.get_by_label("number input for Guidance at the first step").fill("2")
    page.get_by_label("Order: which tokens first").click()
    page.get_by_role("option", name="halton").click()
    assert press(page, "Draw").startswith("Done in 5 steps, seed 0"), page.evaluate("window.told")
    settings = settings_of(picture(page))
    given = {
        "negative_prompt": B,
        "steps": 3,
        "guidance": [2, muse.config.base_sampling.guidance[1]],
        "order": "halton",
    }
    assert given.items() <= settings.items(), f"{settings}"
    expected = muse.generate(
        A, seed=0, **{k: v for k, v in settings.items() if k not in ("model", "fingerprint", "prompt", "seed")}
    )
    assert same(picture(page), expected[0]), "the page draws what the library draws"


def test_a_schedule_is_tried_in_a_world_and_used_for_the_prompt(page, muse):
    page.get_by_role("tab", name="Schedule").click()
    page.get_by_text("cosine: 2 3 6 8 10 11 12 12. Expected KL").wait_for()
    page.locator("#staircase img").wait_for()
    first = page.locator("#staircase img").get_attribute("src")
    page.get_by_label("number input for Drag the curve").fill("3")
    page.keyboard.press("Enter")
    page.get_by_text("pow3: 1 1 2 4 8 11 16 21. Expected KL").wait_for()
    page.get_by_label("number input for Steps in the world").fill("4")
    page.keyboard.press("Enter")
    page.get_by_text("pow3: 1 7 19 37. Expected KL").wait_for()
    assert page.get_by_text("optimum:").inner_text().split(". ")[0].count(" ") == 4, "four counts"
    page.get_by_label("World", exact=True).click()
    page.get_by_role("option", name="potts").click()
    page.get_by_label("Order in the world").click()
    page.get_by_role("option", name="halton").click()
    page.get_by_text("Excess NLL in halton order").wait_for()
    assert page.locator("#staircase img").get_attribute("src") != first, "another figure"
    assert press(page, "Draw the prompt so").startswith("Done in"), page.evaluate("window.told")
    settings = settings_of(picture(page))
    assert {"schedule": "pow3", "order": "halton", "steps": 4}.items() <= settings.items(), f"{settings}"
    expected = muse.generate(settings["prompt"], seed=0, schedule="pow3", order="halton", steps=4)
    assert same(picture(page), expected[0]), "the page draws what the library draws"


def test_the_slider_goes_back_through_the_steps(page):
    press(page, "Draw")
    end = picture(page)
    page.get_by_label("number input for Back through the steps").fill("2")
    page.keyboard.press("Enter")
    page.get_by_text("Base model, step 2").wait_for()
    assert not same(picture(page), end), "a state on the way is shown"
    page.get_by_label("number input for Back through the steps").fill("25")
    page.keyboard.press("Enter")
    page.get_by_text("Done in").wait_for()
    assert same(picture(page), end), "behind the last step stands the picture"


def test_a_painted_mask_changes_the_inside_alone(page):
    press(page, "Draw")
    old = picture(page)
    page.get_by_role("tab", name="Edit").click()  # takes the drawn picture
    page.get_by_text("%").wait_for()
    page.wait_for_timeout(1500)
    paint(page, 0.3, 0.7, 0.5)
    page.get_by_label("Prompt").fill(B)
    assert press(page, "Repaint").startswith("Done in"), page.evaluate("window.told")
    new = picture(page)
    assert settings_of(new)["task"] == "inpaint", f"{settings_of(new)}"
    changed = (np.asarray(old.convert("RGB")) != np.asarray(new.convert("RGB"))).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    side = old.width
    assert changed.sum() > 20, f"{changed.sum()} pixels are new under the stroke"
    assert side * 0.35 < rows.min() <= rows.max() < side * 0.65, f"rows {rows} are new, the stroke is in the middle"
    assert side * 0.2 < columns.min() <= columns.max() < side * 0.8, f"columns {columns} are new"


def test_extend_and_change(page, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    page.get_by_text("%").wait_for()
    page.get_by_role("tab", name="Extend").click()
    page.get_by_label("number input for Pixels").fill("16")
    assert press(page, "Extend").startswith("Done in"), page.evaluate("window.told")
    new = picture(page)
    assert new.size == (80, 64), f"16 pixels at the right: {new.size}"
    assert np.array_equal(np.asarray(new.convert("RGB"))[:, :64], pixels), "mine come back bit for bit"
    page.get_by_role("tab", name="Change all").click()
    page.get_by_label("number input for Iterations").fill("3")
    assert press(page, "Change").startswith("Done in 11 steps"), page.evaluate("window.told")
    settings = settings_of(picture(page))
    assert {"task": "edit", "iterations": 3, "guidance": 4, "fraction": 0.08}.items() <= settings.items(), f"{settings}"
    page.get_by_label("number input for Back through the steps").fill("1")
    page.keyboard.press("Enter")
    page.get_by_text("Base model, step 1:").wait_for()


def test_wrong_uploads_are_a_sentence(page, server, tmp_path):
    before = memory(server.process.pid, "VmHWM")
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "giant.png").write_bytes(giant_png())
    upload(page, tmp_path / "text.png")
    page.get_by_text("cannot be read, it is of an unknown format").wait_for()
    upload(page, tmp_path / "giant.png")
    page.get_by_text("cannot be read, it is too large").wait_for()
    more = memory(server.process.pid, "VmHWM") - before
    assert more < 40, f"{more:.0f} MB more: 20,000 x 20,000 pixels would take 50 to 1,200"
    assert (
        press(page, "Repaint")
        == "Nothing was drawn. There is no picture to edit yet: load one, or draw one and take it"
    )


def test_a_narrow_window_shows_all_of_it(page):
    page.set_viewport_size({"width": 390, "height": 844})
    press(page, "Draw")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} pixels wide in a window of 390"


# --- other sites and wrong programs -----------------------------------------------------------------------------------


def test_other_sites_get_nothing(server):
    def ask(path: str, data: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(server.url + path, data, headers)
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    assert ask("config") == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert ask("config", **headers) == 403, f"{headers}"
        assert ask("gradio_api/upload", b"x", **headers) == 403, f"{headers}: the disk could be filled"


def test_wrong_types_of_a_program_are_a_sentence(server):
    from gradio_client import Client

    client, good = Client(server.url, verbose=False), [A, 0, "", 0, 0, 2, 2, "cosine", "confidence"]
    wrong = [(0, None), (1, "x"), (1, -1), (1, 2**40), (3, [1]), (4, 1e300), (5, True), (5, 2.5), (6, None), (7, "x")]
    for at, value in wrong:
        try:
            said = client.predict(*good[:at], value, *good[at + 1 :], api_name="/draw")[2]
        except Exception as error:
            said = f"**Nothing was drawn.** {error}"
        assert re.match(r"\*\*Nothing was drawn\.\*\* [A-Za-z]", said), f"{at}, {value!r}: {said}"
        assert "\n" not in said, f"one sentence: {said}"
        assert "not supported between" not in said, f"{at}, {value!r}: {said}"


# --- eight programs at once -------------------------------------------------------------------------------------------


def test_eight_clients_each_get_their_own_seed(server, muse, tmp_path):
    from gradio_client import Client

    sampling, seeds = muse.config.base_sampling, range(8)
    expected = [muse.generate(A, seed=seed, steps=3, superres={"steps": 2})[0] for seed in seeds]
    assert len({image.tobytes() for image in expected}) == 8, "eight seeds, eight pictures"
    clients = [Client(server.url, download_files=str(tmp_path / str(seed)), verbose=False) for seed in seeds]

    def ask(seed: int) -> None:
        dials = ["", *sampling.guidance, 3, 2, sampling.schedule, sampling.order]
        made = Image.open(clients[seed].predict(A, seed, *dials, api_name="/draw")[0])
        assert settings_of(made)["seed"] == seed, f"asked for {seed}: {settings_of(made)}"
        assert same(made, expected[seed]), f"the picture is not that of seed {seed}"

    held = []
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):  # the first round warms up, and an allocator may take some more in any one of them
            list(pool.map(ask, seeds))
            held.append(memory(server.process.pid))
    grown = [later - before for before, later in pairwise(held[1:])]
    assert min(grown) < 20, f"every eight drawings take more memory: {held} MB"
