"""A stream of the hub that is cut off: one sentence, what was counted is saved, and the run goes on from it.

The hub is a server on this machine that gives one data set of two files, and may stop in the midst of the second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from commands import HOOK, Cli
from huggingface_hub import constants

from tl_capacity import Measurement
from tl_capacity.errors import SourceCutOffError, TokenSourceError
from tl_capacity.text.streams import documents

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = 40
"""Rows of a file; each has 100 tokens."""


def content(name: str) -> bytes:
    draw = np.random.default_rng(int(name == "b.jsonl"))
    rows = (" ".join(f"w{i}" for i in draw.zipf(1.3, size=100) % 62 + 2) for _ in range(ROWS))
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


FILES = {name: content(name) for name in ("a.jsonl", "b.jsonl")}


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        fault: "none"; "closed" ends the connection within the second file, "silent" sends nothing more.
        last: when the last request ended.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.fault, self.last, self.ended = "none", 0.0, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.answer(json.dumps([entry for entry in self.entries() if entry["path"] in asked]).encode())

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/datasets/some/rows/tree"):
            self.answer(json.dumps(self.entries()).encode())
        elif self.path.startswith("/api/datasets/some/rows"):
            files = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "some/rows", "sha": COMMIT, "tags": [], "siblings": files}).encode())
        elif name in FILES:
            self.answer(FILES[name], 200 if self.command == "HEAD" else 206, cut=name == "b.jsonl")
        elif self.path == "/":
            self.answer(b"")
        else:
            self.answer(b"", 404)

    def entries(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, "size": len(data), "oid": COMMIT} for name, data in FILES.items()]

    def answer(self, data: bytes, status: int = 200, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"etag"')
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cut = cut and self.server.fault != "none" and self.command == "GET"
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
            if self.server.fault == "silent":
                self.server.ended.wait(20)
        self.server.last = time.monotonic()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server, sleep = Hub(), time.sleep
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # its clients wait between attempts
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def arguments(setup: Path, out: Path) -> list[object]:
    sae = ["--sae", setup / "sae", "--source", "some/rows", "--tokens", 10**6, "--batch-rows", 4, "--out", out]
    return ["measure", "--model", setup / "model", *sae]


def test_whole(hub: Hub) -> None:
    assert list(documents("some/rows")) == [
        json.loads(line)["text"] for data in FILES.values() for line in data.splitlines()
    ]


@pytest.mark.parametrize("fault", ["closed", "silent"])
def test_its_rows_so_far_and_one_sentence(hub: Hub, fault: str) -> None:
    hub.fault, read, before = fault, [], datasets.config.STREAMING_READ_MAX_RETRIES
    reason = "peer closed connection.*" if fault == "closed" else "timed out"
    with pytest.raises(
        SourceCutOffError,
        match=rf"'some/rows' was cut off after 40 rows \({reason}\): when the network is back, run .* again",
    ):
        read.extend(documents("some/rows"))
    assert not read or len(read) == ROWS
    assert before == datasets.config.STREAMING_READ_MAX_RETRIES


def test_nothing_was_read(hub: Hub) -> None:
    """A hub that fails before the first row is another sentence, which asks for another name."""
    with pytest.raises(TokenSourceError, match=r"'some/thing' cannot be read .*: check its name") as refused:
        list(documents("some/thing"))
    assert not isinstance(refused.value, SourceCutOffError)


@pytest.mark.slow
def test_a_measurement_goes_on(hub: Hub, setup: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli(*arguments(setup, tmp_path / "whole"))[0] == 0
    whole = Measurement.load(tmp_path / "whole")
    hub.fault = "closed"
    code, _, err = cli(*arguments(setup, tmp_path / "m"))
    assert code == 2
    assert err.startswith("error: the data set 'some/rows' was cut off after 40 rows (peer closed connection")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    saved = Measurement.load(tmp_path / "m")
    assert not saved.complete
    assert 0 < saved[HOOK].summary.n_tokens < whole[HOOK].summary.n_tokens
    hub.fault = "none"
    assert cli(*arguments(setup, tmp_path / "m"), "--resume")[0] == 0
    resumed = Measurement.load(tmp_path / "m")
    assert resumed.provenance.tokens_digest == whole.provenance.tokens_digest
    for name, array in whole[HOOK].summary.arrays.items():
        np.testing.assert_array_equal(resumed[HOOK].summary.arrays[name], array, err_msg=name)


@pytest.mark.slow
def test_the_process_ends(hub: Hub, setup: Path, tmp_path: Path) -> None:
    """No thread or retry of a library holds it up once the hub has given its last answer; what remains is to take the
    modules down, as after any run.
    """
    hub.fault = "closed"
    code = """
import atexit, sys, threading, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
waited_for = lambda: [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
atexit.register(lambda: print(time.monotonic(), waited_for()))
from tl_capacity.cli import main
main(sys.argv[1:])
"""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments(setup, tmp_path / "m"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "was cut off after 40 rows" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    ended, waited_for = done.stdout.split(" ", 1)
    assert float(ended) - hub.last < 2
    assert waited_for.strip() == "[]"
