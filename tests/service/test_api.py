"""The service over HTTP: the command line's bytes, limits, and what goes wrong told plainly."""

import json
import socket
import time

import numpy as np
import pytest
from services import MODEL, png, serving, until

from cadyq import cli
from cadyq.service.catalog import Catalog
from cadyq.service.work import Cancelled

app_module = pytest.importorskip("cadyq.service.app", reason="needs the extra [web]")
httpx = pytest.importorskip("httpx", reason="needs the extra [web-test]")


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service, timeout=60) as found:
        yield found


def events_of(client, address):
    """All events of a job, [(name, data)], until the stream ends."""
    found = []
    with client.stream("GET", address) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = None
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def problem(answer, status, kind):
    """Check that an answer is our one kind of error, and return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["kind"] == kind
    assert "Traceback" not in answer.text
    assert "/tmp" not in answer.text
    assert 'File "' not in answer.text
    return error["message"]


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_the_result_is_the_command_lines(client, tmp_path, suffix):
    source, target = tmp_path / "in.png", tmp_path / f"out.{suffix}"
    source.write_bytes(png())
    code = cli.main(
        ["upscale", str(source), "-o", str(target), "--model", MODEL, "--budget", "1.5", "--threads", "1"]
    )
    assert code == 0
    query = {"model": MODEL, "budget": 1.5, "format": suffix}
    answer = client.post("/v1/upscale", params=query, content=source.read_bytes())
    assert answer.status_code == 200
    assert answer.content == target.read_bytes()
    assert answer.headers["content-type"] == {
        "png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "tif": "image/tiff", "avif": "image/avif"
    }[suffix]  # fmt: skip
    assert 4 <= float(answer.headers["x-cadyq-fqr"]) <= 8


def test_a_streamed_picture_is_the_command_lines_too(client, tmp_path, monkeypatch):
    pytest.importorskip("pyvips", reason="needs the extra [photo]")
    monkeypatch.setattr("cadyq.pictures.STREAM_PIXELS", 1)
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    source.write_bytes(png())
    assert cli.main(["upscale", str(source), "-o", str(target), "--model", MODEL, "--threads", "1"]) == 0
    where = client.post("/v1/jobs", content=source.read_bytes()).headers["location"]
    names = [name for name, _ in events_of(client, f"{where}/events")]
    assert "tiles" in names
    assert client.get(f"{where}/result").content == target.read_bytes()


def test_a_job_is_watched_and_fetched(client):
    created = client.post("/v1/jobs", content=png(70, 100))
    assert created.status_code == 202
    where = created.headers["location"]
    assert where == f"/v1/jobs/{created.json()['id']}"
    found = events_of(client, f"{where}/events")
    names = [name for name, _ in found]
    assert (names[0], names[1], names[-1]) == ("queued", "started", "done")
    begun, figures = dict(found)["started"], dict(found)["done"]["figures"]
    assert (begun["width"], begun["height"], begun["scale"], begun["tile"]) == (100, 70, 4, 32)
    covered = np.zeros((70, 100), int)
    mean = np.full((begun["rows"], begun["cols"]), np.nan)
    for name, data in found:
        if name == "tiles":
            y0, y1, x0, x1 = data["box"]
            covered[y0:y1, x0:x1] += 1
            part = np.array(data["bits"])
            mean[y0 // 32 : y0 // 32 + part.shape[0], x0 // 32 : x0 // 32 + part.shape[1]] = part
            assert data["preview"].startswith("data:image/jpeg;base64,")
    assert (covered == 1).all()
    np.testing.assert_array_equal(mean, figures["mean_bits"])

    status = client.get(where).json()
    assert (status["state"], status["error"]) == ("done", None)
    assert status["figures"]["fqr"] == pytest.approx(mean.mean(), abs=2e-3)
    result = client.get(f"{where}/result")
    assert result.content == client.post("/v1/upscale", content=png(70, 100)).content
    bits = client.get(f"{where}/bits").json()
    assert np.array(list(bits.values())).shape == (32, *mean.shape)
    np.testing.assert_allclose(np.mean(list(bits.values()), axis=0), mean, atol=1e-3)

    assert client.delete(where).status_code == 204
    problem(client.get(where), 404, "not_found")
    problem(client.delete(where), 404, "not_found")


def test_a_failed_job_says_why(client):
    where = client.post("/v1/jobs", content=b"not a picture").headers["location"]
    name, data = events_of(client, f"{where}/events")[-1]
    assert (name, data["kind"]) == ("failed", "picture")
    assert client.get(where).json()["error"] == data
    problem(client.get(f"{where}/result"), 422, "picture")


@pytest.mark.parametrize(
    ("query", "content", "kind", "words"),
    [
        ({}, b"GIF89a?", "picture", "not a picture"),
        ({}, png()[:200], "picture", "damaged"),
        ({}, b"", "picture", "empty"),
        ({"model": "/etc/passwd"}, png(), "argument", MODEL),
        ({"format": "exe"}, png(), "argument", "webp"),
        ({"budget": "lots"}, png(), "argument", "budget"),
        ({"budget": "nan"}, png(), "argument", "budget"),
        ({"budget": 1e9}, png(), "argument", "budget"),
    ],
)
def test_mistakes_are_told(client, query, content, kind, words):
    assert words in problem(client.post("/v1/upscale", params=query, content=content), 422, kind)


def test_limits():
    limited = serving(max_upload=5000, max_pixels=1000, upload_timeout=0.5)
    with limited as address, httpx.Client(base_url=address, timeout=30) as client:
        assert "1000" in problem(client.post("/v1/upscale", content=png(40, 40)), 422, "picture")
        assert "5000" in problem(client.post("/v1/upscale", content=bytes(6000)), 413, "too_large")
        parts = (bytes(1000) for _ in range(9))  # of unknown length: sent in chunks
        problem(client.post("/v1/upscale", content=parts), 413, "too_large")

        def slow():
            yield b"x"
            time.sleep(1.5)
            yield b"y"

        problem(client.post("/v1/upscale", content=slow()), 408, "upload_timeout")


def test_time_is_limited():
    with serving(timeout=1e-9) as address:
        problem(httpx.post(f"{address}/v1/upscale", content=png(), timeout=30), 504, "timeout")


@pytest.fixture
def held(monkeypatch):
    """A service of one worker and one place whose work lasts until it is cancelled."""
    ended = []

    def work(job, catalog, settings, publish):
        while not job.cancelled.wait(0.01):
            pass
        ended.append(job.id)
        raise Cancelled

    monkeypatch.setattr(app_module, "upscale_job", work)
    with (
        serving(workers=1, queue=1, grace=0.05) as address,
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield client, ended


def test_a_full_queue_answers_503_with_retry_after(held):
    client, _ = held
    first = client.post("/v1/jobs", content=png()).headers["location"]
    until(lambda: client.get(first).json()["state"] == "running")
    client.post("/v1/jobs", content=png())
    for address in ("/v1/jobs", "/v1/upscale"):
        answer = client.post(address, content=bytes(3_000_000))
        problem(answer, 503, "busy")
        assert int(answer.headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert metric(client, "cadyq_jobs_refused_total") == 2
    assert metric(client, "cadyq_jobs_waiting") == 1


def test_a_job_is_cancelled_by_its_id(held):
    client, ended = held
    where = client.post("/v1/jobs", content=png()).headers["location"]
    until(lambda: client.get(where).json()["state"] == "running")
    problem(client.get(f"{where}/result"), 409, "unfinished")
    assert client.delete(where).status_code == 204
    until(lambda: ended)
    until(lambda: metric(client, "cadyq_jobs_running") == 0)


def test_work_ends_when_the_client_goes_away(held):
    client, ended = held
    content = png()
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port)) as connection:
        head = f"POST /v1/upscale HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        until(lambda: metric(client, "cadyq_jobs_running") == 1)
    until(lambda: ended)


@pytest.mark.parametrize("keep", [False, True])
def test_work_ends_when_nobody_listens_unless_it_is_to_be_kept(held, keep):
    client, ended = held
    where = client.post("/v1/jobs", params={"keep": keep}, content=png()).headers["location"]
    with client.stream("GET", f"{where}/events") as stream:
        assert next(stream.iter_lines()) == "id: 0"
    if not keep:
        until(lambda: ended)
    else:
        time.sleep(0.4)
        assert client.get(where).json()["state"] == "running"


def test_pages_of_other_origins_are_kept_out(client):
    answer = client.get("/v1/models", headers={"host": "evil.example"})
    assert "evil.example" in problem(answer, 403, "forbidden")
    for site in ("cross-site", "same-site"):
        problem(client.post("/v1/jobs", content=png(), headers={"sec-fetch-site": site}), 403, "forbidden")
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link to the page
    assert client.get("/healthz", headers={"host": "localhost:1"}).status_code == 200
    assert client.get("/healthz", headers={"host": "[::1]:8000"}).status_code == 200


def test_the_page_and_nothing_else(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for address in ("/page.js", "/view.js", "/page.css", "/icon.svg"):
        found = client.get(address)
        assert found.status_code == 200
        for remote in ("https://", "http://"):
            assert remote not in found.text.replace("http://www.w3.org", "")
    for address in ("/page/../app.py", "/%2e%2e/app.py", "/app.py", "/docs", "/etc/passwd"):
        problem(client.get(address), 404, "not_found")


def test_what_is_offered_and_described(client):
    offer = client.get("/v1/models").json()
    assert [(one["name"], one["is_default"]) for one in offer["models"]] == [(MODEL, True)]
    assert offer["formats"] == ["png", "jpg", "webp", "tif", "avif"]
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/upscale", "/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/result", "/v1/jobs/{job_id}/bits",
        "/v1/jobs/{job_id}/events", "/v1/models", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    post = described["paths"]["/v1/upscale"]["post"]
    assert MODEL in json.dumps(post["parameters"])
    assert "Retry-After" in json.dumps(post["responses"]["503"])
    assert client.get("/readyz").json() == {"status": "ready"}
    assert metric(client, 'cadyq_http_requests_total{method="GET",route="/readyz",status="200"}') >= 1


def test_a_model_whose_tiles_exit_offers_zero_bits():
    offered = {model["name"]: model["candidate_bits"] for model in Catalog().describe()}
    assert offered["srresnet-x4-exit"] == [0, 8]
    assert offered["srresnet-x4-cadyq"] == [4, 6, 8]
