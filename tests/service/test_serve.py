"""`cadyq serve`: starts, tells its address, and explains what is wrong in one line."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import cadyq
from cadyq import cli


def test_a_missing_extra_is_explained(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve"]) == 7
    assert "pip install 'cadyq[web]'" in capsys.readouterr().err


def test_mistakes(capsys):
    pytest.importorskip("fastapi", reason="needs the extra [web]")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, word in (
            (["--port", str(port)], str(port)),
            (["--port", "70000"], "65535"),
            (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
            (["--model", "no-such-model"], "no-such-model"),
            (["--queue", "0"], "queue"),
            (["--max-upload", "-1"], "max_upload"),
        ):
            assert cli.main(["serve", *arguments]) == 2
            told = capsys.readouterr().err
            assert word in told
            assert "Traceback" not in told


def test_it_serves_and_ends(tmp_path):
    pytest.importorskip("fastapi", reason="needs the extra [web]")
    source = str(Path(cadyq.__file__).parents[1])
    command = [sys.executable, "-m", "cadyq", "serve", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": source}, cwd=tmp_path,
    )  # fmt: skip
    try:
        address = process.stdout.readline().split()[1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}healthz", timeout=20) as answer:
            assert answer.read() == b'{"status":"ok"}'
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in told
