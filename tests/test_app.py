"""app.py without a browser or a server: what each button does. test_page.py has the page itself."""

import asyncio
import socket
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minimuse import cli
from minimuse.app import HOUR, REQUEST, follow, guard, painted, serve
from minimuse.pictures import settings_of

A = "a red cube"
TWO = {"steps": 2, "superres": {"steps": 2}}  # steps of each stage


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app", "--checkpoint", "nano"]) == 2
    assert capsys.readouterr().err.startswith('minimuse: the app needs gradio: pip install "minimuse[app]": ')


# --- the buttons ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tiny_muse):
    """The page of the tiny Muse, laid out."""
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from minimuse.app import Page

    page = Page(tiny_muse)
    page.build()
    return page


@pytest.fixture
def request_(tiny_muse):
    """Prompt, seed, negative prompt and controls, two steps for each decode."""
    base = tiny_muse.config.base_sampling
    return [A, 7, "", *base.guidance, 2, 2, base.schedule, base.order]


@pytest.fixture
def start(tiny_muse):
    side = tiny_muse.config.high_tokenizer.image_size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def run(page, updates) -> tuple[list[str], dict]:
    """The updates of a drawing -> its sentences, and the last update by the names of the page's parts."""
    names = {id(getattr(page, name)): name for name in ("picture", "tokens", "status", "strip", "scrub", "last")}
    updates = [{names[id(k)]: v for k, v in update.items()} for update in updates]
    return [update["status"] for update in updates], updates[-1]


def test_controls_left_alone_are_the_checkpoints(page, tiny_muse):
    base, high = tiny_muse.config.base_sampling, tiny_muse.config.superres_sampling
    left = [A, 1, "", *base.guidance, base.steps, high.steps, base.schedule, base.order]
    _, end = run(page, page.draw(*left))
    assert end["picture"].tobytes() == tiny_muse.generate(A, seed=1)[0].tobytes(), "they draw what no settings draw"
    assert "superres" not in settings_of(end["picture"]), "only changed controls are noted"
    _, end = run(page, page.draw(*left[:-1], "halton"))
    expected = tiny_muse.generate(A, seed=1, order="halton")[0]
    assert end["picture"].tobytes() == expected.tobytes(), "another order has no ranking noise, as in `generate`"


def test_draw_shows_each_step_then_the_picture(page, request_, tiny_muse):
    sentences, end = run(page, page.draw(*request_))
    heads = [sentence.split(":")[0] for sentence in sentences[1:-1]]
    assert heads == [f"**{stage}, step {i}**" for stage in ("Base model", "Super-resolution") for i in (1, 2)]
    assert sentences[-1].startswith("**Done** in 4 steps, seed 7"), sentences[-1]
    expected = tiny_muse.generate(A, seed=7, steps=2, superres={"steps": 2})[0]
    assert end["picture"].tobytes() == expected.tobytes(), "the page draws what the library draws"
    assert settings_of(end["picture"])["superres"]["steps"] == 2, "changed settings are noted"
    shown, picture = end["last"]
    assert len(shown) == 5
    for at, text in ((1, "Base model, step 1"), (5, "Done** in 4 steps, seed 7")):
        update = page.look_back(end["last"], at)
        assert text in update[page.status], "the slider goes back to a step, and to the picture"
    assert update[page.picture] is picture
    assert set(page.take(end["last"])) == {page.start, page.canvas}, "it can be edited"


def test_edits(page, request_, start, tiny_muse):
    zoom = page.zoom * page.side
    canvas = {"layers": [layer(zoom, 0, 0, zoom // 2, zoom // 2)]}
    _, end = run(page, page.repaint(start, canvas, *request_))
    assert settings_of(end["picture"])["task"] == "inpaint"
    old, new = np.asarray(start), np.asarray(end["picture"])
    half = page.side // 2 + 1
    assert (old[half:] == new[half:]).all(), "pixels outside the mask stay"
    assert (old[:half, :half] != new[:half, :half]).any(), "pixels inside are new"
    _, end = run(page, page.extend(start, "right", 16, *request_))
    assert end["picture"].size == (page.side + 16, page.side)
    _, end = run(page, page.change(start, 3, 0.1, 2.0, *request_))
    given = {"task": "edit", "iterations": 3, "fraction": 0.1, "guidance": 2.0}
    assert given.items() <= settings_of(end["picture"]).items()


def test_what_cannot_be_drawn_is_a_sentence(page, request_, start, tmp_path):
    for updates, text in [
        (page.repaint(None, None, *request_), "There is no picture to edit yet"),
        (page.repaint(start, None, *request_), "The mask is empty"),
        (page.change(start, 0, 0.1, 2.0, *request_), "iterations is 0; give a positive whole number"),
    ]:
        sentences, _ = run(page, updates)
        assert sentences[-1].startswith("**Nothing was drawn.**"), sentences
        assert text in sentences[-1], sentences
    (tmp_path / "text.png").write_text("I am not a picture")
    with pytest.raises(page.gr.Error, match="cannot be read, it is of an unknown format"):
        page.load(tmp_path / "text.png")
    Image.new("L", (200, 90), 128).save(tmp_path / "gray.jpg")
    assert page.load(tmp_path / "gray.jpg")[page.start].size == (page.side, page.side)
    page.take(None), page.look_back(None, 1)  # nothing was drawn yet


def test_the_tab_of_schedules(page):
    text, figure = page.schedule("chain", "pow2", "random", 8)
    assert text.startswith("**pow2**: 1 3 5 7 9 11 13 15. Expected KL 0.05"), "64 tokens, 1 - u^2"
    assert len(figure.axes) == 1 + 6 + 6, "the curve, what is drawn, and the world"
    for wrong in ("dalle", "", None, "pow0"):
        assert page.schedule("chain", wrong, "random", 8)[0].startswith("**Nothing was drawn.** schedule is"), wrong
    assert "steps is 0" in page.schedule("chain", "cosine", "random", 0)[0]


def test_unknown_words_are_named(page, request_):
    sentences, _ = run(page, page.draw("quixotic zebras", *request_[1:]))
    assert "tiny never saw quixotic, zebras in training" in sentences[-1]


# --- who may use the page ---------------------------------------------------------------------------------------------


def answer(app, method: str = "GET", **headers: str) -> int:
    """The status of an ASGI app's answer to a request with these headers."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": method, "headers": raw}, None, send))
    return sent[0]["status"]


@pytest.fixture
def guarded():
    """guarded(host) -> an app behind the guard, which answers 200."""
    pytest.importorskip("gradio", reason="the extra `app` is not installed")

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    return lambda host="127.0.0.1": guard(app, host)


def test_only_its_own_hosts_are_answered(guarded):
    for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:80", "[::1]:7860"):
        assert answer(guarded(), host=host) == 200, f"{host} is this machine"
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.0.7:7860", "", "[", "a:b:c"):
        assert answer(guarded(), host=host) == 403, f"{host!r} may be another site whose name leads here"
    assert answer(guarded()) == 403, "no host is no known host"
    assert answer(guarded("192.168.0.7"), host="192.168.0.7:7860") == 200, "it was started for this address"
    assert answer(guarded("::1"), host="[::1]:7860") == 200
    everywhere = guarded("0.0.0.0")
    assert [answer(everywhere, host=host) for host in ("10.0.0.7:1", "[fe80::1]:1", "dead.beef")] == [200, 200, 403]


def test_other_origins_are_refused(guarded):
    own = {"host": "localhost:7860"}
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:8000",
        "http://[bad",
        "http://localhost:7860.evil.example",
        "",
    ):
        assert answer(guarded(), "POST", content_length="1", origin=origin, **own) == 403, origin
    assert answer(guarded(), "POST", content_length="1", origin="http://localhost:7860", **own) == 200


def test_uploads_have_a_limit(guarded, monkeypatch):
    app, own = guarded(), {"host": "localhost"}
    assert answer(app, "POST", **own) == 403, "a request of unknown length could fill the disk"
    assert answer(app, "POST", content_length=str(REQUEST + 1), **own) == 403
    for _ in range(HOUR // REQUEST):
        assert answer(app, "POST", content_length=str(REQUEST), **own) == 200
    assert answer(app, "POST", content_length="1", **own) == 403, "all requests of an hour have a limit"
    assert answer(app, **own) == 200, "reading goes on"
    later = time.monotonic() + 3601
    monkeypatch.setattr("minimuse.app.monotonic", lambda: later)
    assert answer(app, "POST", content_length="1", **own) == 200, "an hour later files are deleted"


def test_a_client_that_leaves_is_no_error(guarded):
    from starlette.requests import ClientDisconnect

    async def left(scope, receive, send):
        raise ClientDisconnect

    request = {"type": "http", "method": "GET", "headers": [(b"host", b"localhost")]}
    assert asyncio.run(guard(left, "127.0.0.1")(request, None, None)) is None, "nobody waits for the answer"


def test_where_it_cannot_listen_is_a_sentence(monkeypatch):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    monkeypatch.setattr("minimuse.app.Muse.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wrong = [
            ("127.0.0.1", taken.getsockname()[1]),
            ("999.1.1.1", None),
            ("192.0.2.1", 7860),
            ("127.0.0.1", 99_999_999),
        ]
        for host, port in wrong:
            with pytest.raises(ValueError, match=r"cannot listen on .*give an address of this machine and a free port"):
                serve("nano", host=host, port=port)


# --- following a drawing ----------------------------------------------------------------------------------------------


def test_follow_gives_the_steps_then_the_picture(tiny_muse):
    seen = []

    def draw(callback):
        return tiny_muse.generate(A, seed=3, **TWO, callback=lambda step: (seen.append(step), callback(step)))

    *steps, picture = follow(draw)
    assert [a is b for a, b in zip(steps, seen, strict=True)] == [True] * 4, "each step, in order"
    assert picture.tobytes() == tiny_muse.generate(A, seed=3, **TWO)[0].tobytes(), "at last the picture"


def test_follow_gives_a_step_before_the_next_is_made():
    go, made = threading.Semaphore(0), []

    def draw(callback):
        for i in range(3):
            assert go.acquire(timeout=60), "nobody asked for the next step"
            made.append(i)
            callback(i)
        return ["picture"]

    following = follow(draw)
    for i in range(3):
        go.release()
        assert (next(following), made) == (i, list(range(i + 1))), "a step comes as soon as it is made"
    assert list(following) == ["picture"]


def test_follow_raises_what_the_drawing_raises(tiny_muse):
    with pytest.raises(ValueError, match="steps is 0"):
        list(follow(lambda callback: tiny_muse.generate(A, steps=0, callback=callback)))


def test_a_drawing_that_nobody_follows_stops():
    made = []

    def draw(callback):
        for i in range(10_000):
            made.append(i)
            callback(i)
            time.sleep(0.001)

    following = follow(draw)
    list(islice(following, 1))
    following.close()  # as gradio does when the client has left; it returns when the drawing has stopped
    assert len(made) < 10_000, "it drew to its end"


# --- the painted mask -------------------------------------------------------------------------------------------------


def layer(side: int, *box: int, alpha: int = 255) -> Image.Image:
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).rectangle(box, fill=(255, 0, 0, alpha))
    return image


def test_a_pixel_is_painted_if_a_part_of_it_is():
    mask = painted([layer(96, 12, 6, 17, 6)], side=16)  # one row of the third pixel of the second row
    assert np.argwhere(mask).tolist() == [[1, 2]], f"{np.argwhere(mask).tolist()}"
    mask = painted([layer(96, 12, 6, 18, 6), layer(96, 95, 95, 95, 95)], side=16)
    assert np.argwhere(mask).tolist() == [[1, 2], [1, 3], [15, 15]], f"all layers count: {np.argwhere(mask).tolist()}"
    mask = painted([layer(192, 0, 0, 11, 11)], side=16)
    assert np.argwhere(mask).tolist() == [[0, 0]], "a layer of another size is scaled, as of a screen of finer pixels"


@pytest.mark.parametrize("layers", [[], [layer(96, 0, 0, 95, 95, alpha=100)], [Image.new("RGBA", (96, 96))]])
def test_an_empty_mask_is_refused(layers):
    with pytest.raises(ValueError, match="The mask is empty: paint over the part"):
        painted(layers, side=16)
