"""The demo answers as predict does, to this computer alone, and takes nothing on trust."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from browser import ELEMENT, browser
from conftest import paint
from rows import COLOURS, contents, make_product, refused, untouched

from vitft import demo
from vitft.demo import Desk, Server, main, require_loopback
from vitft.errors import MachineError, RecipeError
from vitft.predict import Predictor
from vitft.run import run

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '" onload="alert(3)',
)


@contextmanager
def serving(desk):
    with Server(desk, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def photo(tmp_path):
    return paint(tmp_path / "new" / "photo.jpg", (210, 40, 40), seed=7, size=60)


@pytest.fixture
def server(tmp_path):
    with serving(Desk(make_product(tmp_path / "made" / "model", temperature=1.7), "cpu")) as found:
        yield found


def call(server, method, path, body=None, **headers):
    """Status, headers and body; a header given as None is not sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    given = {"Host": f"127.0.0.1:{server.server_port}"}
    given |= {"X-Vitft": "ask"} if method == "POST" else {}
    given |= {"Content-Length": str(len(body))} if body is not None else {}
    given |= {k.replace("_", "-"): v for k, v in headers.items()}
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        if body:
            connection.send(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def asked(server, data, **headers):
    status, _, body = call(server, "POST", "/ask", data, **headers)
    return status, json.loads(body)


def test_a_photograph_gets_predicts_own_answer(server, photo, tmp_path):
    (want,) = Predictor(tmp_path / "made", "cpu")([photo])
    for _ in range(3):  # padded, compared, alone: the same bits
        status, said = asked(server, photo.read_bytes())
        assert status == 200
        found = {row["name"]: row["p"] for row in said["top"]}
        assert [found[c] for c in COLOURS] == want.probabilities.tolist()
    assert [row["p"] for row in said["top"]] == sorted(found.values(), reverse=True)
    assert said["size"] == "60 x 60 px"
    assert [p["title"] for p in said["pictures"]] == [
        "Photograph",
        "What spoke for it",
        "Attention",
    ]
    assert all(p["source"].startswith("data:image/jpeg;base64,") for p in said["pictures"])
    assert said["near"] == []


def test_a_run_shows_its_nearest_training_photographs_and_its_doubts(tiny_recipe, tiny_photos):
    folder = run(tiny_recipe("head", "train.epochs=1")).folder
    with untouched(tiny_photos):
        desk = Desk(folder, "cpu")
        twin = desk.nearest.files[5]
        with serving(desk) as server:
            _, said = asked(server, twin.read_bytes())
    assert said["near"][0]["file"] == twin.name
    assert said["near"][0]["name"] == twin.parent.name
    assert said["near"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    cosines = [row["cosine"] for row in said["near"]]
    assert cosines == sorted(cosines, reverse=True)
    assert len(cosines) == demo.NEIGHBOURS
    row = desk.predictor.features(demo.images.decode(twin.read_bytes(), twin, card_decode(desk)))
    by_hand = desk.nearest.unit @ (row / np.linalg.norm(row))
    assert cosines == pytest.approx(sorted(by_hand.tolist(), reverse=True)[:6], abs=1e-6)


def card_decode(desk):
    return desk.predictor.decode


def test_doubt_is_told_in_predicts_words(server, photo):
    server.desk.predictor._threshold = 2.0
    _, said = asked(server, photo.read_bytes())
    assert said["doubts"] == ["I don't know: below the run's threshold"]


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff\xe0" + bytes(100)])
def test_what_is_no_photograph_is_refused_in_words(server, data):
    status, said = asked(server, data)
    assert status == 422
    assert len(said["error"]) > 10
    assert "Traceback" not in said["error"]


def test_uploads_are_bounded_before_they_are_read(server, monkeypatch):
    status, said = asked(server, None, Content_Length=str(demo.LIMIT + 1))
    assert (status, said["error"]) == (
        413, "30,000,001 bytes > 30,000,000 that one photograph may have",
    )  # fmt: skip
    assert asked(server, None)[0] == 411
    assert asked(server, None, Content_Length="-1")[0] == 411
    assert asked(server, None, Content_Length="1e3")[0] == 411
    monkeypatch.setattr(demo.Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
        line.sendall(b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % server.server_port)
        line.sendall(b"X-Vitft: ask\r\nContent-Length: 1000\r\n\r\nhalf")
        assert line.recv(100) == b""  # given up on


def test_another_hosts_name_and_another_sites_page_are_refused(server, photo):
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", None):
        assert call(server, "GET", "/", Host=host)[0] == 421
        assert asked(server, photo.read_bytes(), Host=host)[0] == 421
    assert asked(server, photo.read_bytes(), X_Vitft=None)[0] == 403
    assert asked(server, photo.read_bytes(), Origin="http://evil.example")[0] == 403
    port = server.server_port
    assert asked(server, photo.read_bytes(), Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert call(server, "GET", "/", Host=f"localhost:{port}")[0] == 200
    assert call(server, "OPTIONS", "/ask")[0] == 501  # no preflight is granted


@pytest.mark.parametrize(
    "path", ["/../demo.py", "/demo.html", "/..%2fdemo.py", "/x", "/demo.css?a"]
)
def test_nothing_else_is_served(server, path):
    assert call(server, "GET", path)[0] == 404


def test_every_answer_carries_the_policy(server):
    for path in ("/", "/demo.css", "/demo.js", "/none"):
        _, headers, _ = call(server, "GET", path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"


def test_names_from_anyone_reach_the_page_as_text(tmp_path):
    made = make_product(tmp_path / "made" / "model", classes=HOSTILE)
    page = Desk(made, "cpu").page()
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", ""])
def test_other_than_loopback_is_refused(host, tmp_path, capsys):
    refused(
        capsys, main, [tmp_path, "--host", host],
        code=2, id="demo.host", says=("--host", f"got {host}; the page has no passwords"),
        fix="ssh -L",
    )  # fmt: skip


def test_loopback_is_taken_and_a_taken_port_is_said(server):
    for host in ("127.0.0.1", "localhost", "::1"):
        require_loopback(host)
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(MachineError, match=r"demo.port.*cannot be used"):
        Server(server.desk, "127.0.0.1", server.server_port)
    with pytest.raises(RecipeError, match=r"demo.port.*0 to 65535, got 70000"):
        main(["x", "--port", "70000"])


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path, photo):
    made = make_product(tmp_path / "made" / "model", classes=HOSTILE)
    hostile = photo.rename(photo.with_name("<b>photo<b>.jpg"))
    broken = tmp_path / "new" / "broken.jpg"
    broken.write_bytes(b"<html>")
    before = contents(tmp_path)
    with serving(Desk(made, "cpu")) as server, browser() as window:
        for look in ({}, {"dark": True}, {"width": 360, "height": 740}):
            window.look(**look)
            window("POST", "/url", {"url": server.url})
            put(window, hostile)
            window.becomes("return document.getElementById('result').hidden", False, 20)
            bars = "return [...document.querySelectorAll('#bars li span:first-child')]"
            assert set(window.js(bars + ".map(e => e.textContent)")) == set(HOSTILE)
            assert (
                window.js("return document.querySelectorAll('#bars img, #bars script').length") == 0
            )
            assert (
                window.js("return document.getElementById('status').textContent")[:12]
                == "<b>photo<b>."
            )
            assert window.js("return document.documentElement.scrollWidth <= innerWidth")
            shown = window.js("return document.getElementById('picture').src")
            window.click("#views button:nth-child(3)")
            assert window.js("return document.getElementById('picture').src") != shown
            loaded = (
                "const p = document.getElementById('picture'); return p.complete && p.naturalWidth"
            )
            assert window.becomes(loaded, 60)
        assert window.complaints() == []
        put(window, broken)
        window.becomes("return document.getElementById('result').hidden", True)
        assert "broken.jpg: " in window.js("return document.getElementById('status').textContent")
    assert contents(tmp_path) == before


def put(window, file):
    found = window("POST", "/element", {"using": "css selector", "value": "#file"})
    window("POST", f"/element/{found[ELEMENT]}/value", {"text": str(file)})
