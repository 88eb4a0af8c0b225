"""Bulk jobs: the same bytes as one by one, on disks and behind URLs, here and on a cluster, whoever is killed."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from networks import scene
from PIL import Image

import cadyq
from cadyq import cli
from cadyq.bulk import Cluster, Item, find_items, make_order, run_bulk
from cadyq.bulk import run as running
from cadyq.bulk import worker as workers
from cadyq.bulk.records import record_name
from cadyq.bulk.worker import Worker
from cadyq.errors import ArgumentError, CadyqError, MissingExtraError
from cadyq.io.files import temporary_name
from cadyq.io.stores import LocalStore, UrlStore, is_url, open_store
from cadyq.pictures import Wanted

MODEL = "srresnet-x4-cadyq"
WANTED = Wanted(model=MODEL, threads=1)


def _png(source):
    return ".png"


@pytest.fixture
def tree(tmp_path):
    """Three pictures, one of them in a folder, and what is none."""
    for name in ("a.png", "b.jpg", "sub/c.tif", ".hidden.png", ".cadyq/d.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(20, 24, seed=len(name))).save(path)
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    return tmp_path / "in"


@pytest.fixture
def expected(tree, tmp_path, capsys):
    """What `cadyq upscale` makes of them."""
    assert cli.main(["upscale", str(tree), "-o", str(tmp_path / "one"), "-r", "--model", MODEL]) == 0
    capsys.readouterr()
    return _contents(tmp_path / "one")


def _contents(folder):
    names = (p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file())
    return {str(n): (folder / n).read_bytes() for n in names if not any(part[0] == "." for part in n.parts)}


def _temporary(folder):
    return [p.name for p in Path(folder).rglob("*.tmp")]


def _bulk(source, output, **options):
    """Do a job in this process: its outcome, and its events without progress."""
    events = []
    base, items = find_items(str(source), str(output), _png, recursive=True)
    order = make_order(base, str(output), options.pop("wanted", WANTED), **options)
    outcome = run_bulk(order, items, events.append)
    return outcome, [e for e in events if e["event"] != "progress"]


def _through_url(path):
    pytest.importorskip("fsspec")
    return f"dir://{path.name}::file://{path.parent}"


WAYS = pytest.mark.parametrize(
    "way", [str, _through_url, lambda p: f"file://{p}"], ids=["path", "url", "file"]
)


@WAYS
def test_the_same_bytes_as_one_by_one_and_only_once(tree, expected, tmp_path, way):
    output = tmp_path / "deep" / "out"
    outcome, events = _bulk(way(tree), way(output))
    assert (outcome.done, outcome.skipped, outcome.exit_code) == (3, 0, 0)
    assert [e["event"] for e in events] == ["start", *["done"] * 3, "end"]
    assert _contents(output) == expected
    assert all(json.dumps(e) for e in events)
    assert not _temporary(output)
    outcome, events = _bulk(way(tree), way(output))
    assert (outcome.done, outcome.skipped) == (0, 3)
    Image.fromarray(scene(20, 24, seed=9)).save(tree / "a.png")
    assert _bulk(way(tree), way(output))[0].done == 1
    assert _contents(output)["a.png"] != expected["a.png"]
    assert _bulk(way(tree), way(output), wanted=Wanted(model=MODEL, scale=4, budget=-1))[0].done == 3


@WAYS
def test_copies_are_known_by_their_content(tree, tmp_path, way):
    output = tmp_path / "out"
    _bulk(way(tree), way(output))
    for path in (tree / "a.png", output / "b.png"):
        os.utime(path, (1, 1))
    assert _bulk(way(tree), way(output))[0].skipped == 3


@WAYS
def test_what_is_not_ours_is_left_alone_unless_told_otherwise(tree, expected, tmp_path, way):
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.png").write_text("mine")
    outcome, events = _bulk(way(tree), way(output))
    assert (outcome.done, outcome.failed) == (2, (2,))
    assert "--overwrite" in next(e for e in events if e["event"] == "failed")["message"]
    assert (output / "a.png").read_text() == "mine"
    assert _bulk(way(tree), way(output), overwrite=True)[0].done == 3
    assert _contents(output) == expected


@WAYS
def test_a_bad_picture_is_told_by_its_own_name(tree, tmp_path, way):
    (tree / "a.png").write_text("bad")
    outcome, events = _bulk(way(tree), way(tmp_path / "out"))
    assert (outcome.done, outcome.failed, outcome.exit_code) == (2, (3,), 3)
    failed = next(e for e in events if e["event"] == "failed")
    assert failed["message"].startswith(failed["source"])
    assert "in/a.png" in failed["source"]


class _Killed(BaseException):
    """What ends a worker at this line, and nothing behind it."""


@WAYS
@pytest.mark.parametrize("when", ["before the record", "before the name", "before the stamp"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_whenever_a_worker_dies_nothing_is_lost(tree, expected, tmp_path, monkeypatch, way, when, old):
    output = tmp_path / "out"
    if old:
        _bulk(way(tree), way(output), wanted=Wanted(model=MODEL, budget=-1))
    store = type(open_store(way(output)))
    moments = {"record": ("write", 1), "name": ("put", 1), "stamp": ("write", 2)}
    method, nth = moments[when.split()[-1]]
    calls, real = [], getattr(store, method)

    def dies(self, *arguments):
        calls.append(arguments)
        if len(calls) == nth:
            raise _Killed
        return real(self, *arguments)

    monkeypatch.setattr(store, method, dies)
    with pytest.raises(_Killed):
        _bulk(way(tree), way(output))
    monkeypatch.undo()
    got_its_name = {"a.png"} if when == "before the stamp" else set()
    assert set(_contents(output)) == (set(expected) if old else got_its_name)
    outcome, _ = _bulk(way(tree), way(output))
    assert outcome.exit_code == 0
    assert outcome.skipped == (when == "before the stamp")
    assert _contents(output) == expected


@WAYS
def test_leftovers_go_and_nothing_else(tree, tmp_path, way):
    output = tmp_path / "out"
    _bulk(way(tree), way(output))
    left = [output / "sub" / temporary_name("c.png"), output / temporary_name("a.png")]
    left.append(output / ".cadyq" / temporary_name(Path(record_name("a.png")).name))
    other = output / temporary_name("other.png")
    for path in (*left, other):
        path.write_text("half")
    assert _bulk(way(tree), way(output))[0].skipped == 3
    assert _temporary(output) == [other.name]


@WAYS
def test_errors_that_go_away_are_waited_for(tree, expected, tmp_path, monkeypatch, way):
    monkeypatch.setattr(workers, "_FIRST_WAIT", 0.001)
    output = tmp_path / "out"
    real = {}
    for store in (LocalStore, UrlStore):
        for name in ("look", "put", "read", "write"):
            real[store, name] = getattr(store, name)
    seen = set()

    def flaky(kind):
        def call(self, *arguments):
            access = (*kind, arguments[0] if kind[1] == "write" else arguments[-1])
            if access not in seen and not access[-1].endswith(".tmp"):
                seen.add(access)
                raise ConnectionError("reset by peer")
            return real[kind](self, *arguments)

        return call

    for kind in real:
        monkeypatch.setattr(*kind, flaky(kind))
    outcome, _ = _bulk(way(tree), way(output))
    assert (outcome.done, outcome.exit_code) == (3, 0)
    assert _contents(output) == expected
    seen.clear()
    outcome, events = _bulk(way(tree), way(output), retries=0)
    assert outcome.failed == (3, 3, 3)
    assert "reset by peer" in events[1]["message"]


@pytest.mark.skipif(os.name == "nt", reason="no such locks")
def test_local_copies_of_dead_workers_go(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, young = tmp_path / "cadyq-bulk-dead", tmp_path / "cadyq-bulk-young"
    for folder in (dead, young):
        folder.mkdir()
        (folder / "lock").touch()
    with workers._scratch() as alive:
        for folder in (dead, alive):
            os.utime(folder, (1, 1))
        Worker(make_order(str(tree), str(tmp_path / "out"), WANTED))
        assert sorted(tmp_path.glob("cadyq-bulk-*")) == sorted([young, alive])


def test_a_full_disk_stops_everything(tree, tmp_path, monkeypatch):
    def full(self, local, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStore, "put", full)
    with pytest.raises(CadyqError, match="No space left on device; when that is mended") as caught:
        _bulk(tree, tmp_path / "out")
    assert caught.value.exit_code == 3


def test_a_machine_with_another_version_or_model_refuses(tree, tmp_path):
    _, items = find_items(str(tree), str(tmp_path / "out"), _png)
    order = make_order(str(tree), str(tmp_path / "out"), WANTED)
    for other, word in (({"version": "0.0"}, "0.0"), ({"settings": "other"}, "another model")):
        event = Worker(type(order)(**{**vars(order), **other}))(items[0])
        assert (event["event"], word in event["message"]) == ("stop", True)
    lacking = type(order)(**{**vars(order), "output": "nonsense://out"})
    event = Worker(lacking)(items[0])
    assert (event["event"], event["exit_code"]) == ("stop", 2)
    assert event["message"].startswith(socket.gethostname())
    assert not (tmp_path / "out").exists()


def test_which_pictures(tree, tmp_path, raises_clearly):
    fsspec = pytest.importorskip("fsspec")
    deep = [Item("a.png", "a.png"), Item("b.jpg", "b.png"), Item("sub/c.tif", "sub/c.png")]
    room = f"::file://{tmp_path}"
    ways = ((str(tree), ""), (f"file://{tree}", ""), ("dir://in", room))
    for folder, end in ways:

        def find(names="", recursive=False, folder=folder, end=end, to="out"):
            return find_items(f"{folder}{names}{end}", f"{folder}/{to}{end}", _png, recursive)[1]

        assert find() == deep[:2]
        assert find("/", recursive=True) == deep
        assert find("/*.jpg") == [deep[1]]
        assert find("/**/*.tif") == [Item("sub/c.tif", "sub/c.png")]
        assert find("/b.jpg") == [deep[1]]
        raises_clearly(ArgumentError, lambda find=find: find("/*.gif"), "gif")
        raises_clearly(ArgumentError, lambda find=find: find(to=""), "not one of the inputs")
    (tree / "out").mkdir()
    (tree / "out" / "old.png").touch()
    assert find(recursive=True) == deep
    (tree / "a.jpg").touch()
    for folder, end in ways:
        raises_clearly(
            ArgumentError, lambda g=f"{folder}{end}": find_items(g, str(tmp_path / "x"), _png), "not both"
        )
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bulk-in/a.png", b"")
    assert find_items("memory://bulk-in", str(tmp_path), _png) == ("memory://bulk-in", [deep[0]])


def test_wrong_arguments(tree, tmp_path, raises_clearly):
    pytest.importorskip("fsspec")
    assert [is_url(u) for u in ("a/b", "C:\\x", "file:///a", "s3://a/b", "dir::file:///a")] == [
        *[False] * 3,
        *[True] * 2,
    ]
    raises_clearly(ArgumentError, lambda: open_store("nonsense://a"), "nonsense", "protocol")
    raises_clearly(ArgumentError, lambda: make_order("a", "memory://out", WANTED), "memory", "rename")
    raises_clearly(ArgumentError, lambda: make_order("a", str(tree / "a.png"), WANTED), "a folder")
    raises_clearly(ArgumentError, lambda: make_order("a", "b", WANTED, retries=-1), "retries", -1)
    raises_clearly(ArgumentError, lambda: Cluster(workers=0), "workers", 0)
    raises_clearly(ArgumentError, lambda: make_order("a", "b", Wanted(model="nothing")), "model", "nothing")


@pytest.mark.parametrize("missing", ["ray", "fsspec"])
def test_without_the_extra(tree, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    source = f"dir://in::file://{tree.parent}" if missing == "fsspec" else str(tree)
    code = cli.main(["bulk", source, str(tmp_path / "out"), *(["--ray"] if missing == "ray" else [])])
    assert code == MissingExtraError.exit_code == 7
    said = capsys.readouterr().err
    assert f"{missing} is not installed" in said
    assert "pip install 'cadyq[ray]'" in said
    assert not _contents(tmp_path / "out")


def test_the_command_without_ray(tree, expected, tmp_path, capsys):
    call = ["bulk", str(tree), str(tmp_path / "out"), "-r", "--model", MODEL, "--threads", "1"]
    assert cli.main([*call, "--workers", "2"]) == 2
    assert "--ray" in capsys.readouterr().err
    assert cli.main(call) == 0
    assert f"{tree}/a.png -> {tmp_path}/out/a.png: 96x80" in capsys.readouterr().out
    assert _contents(tmp_path / "out") == expected


@pytest.mark.filterwarnings("ignore")
def test_an_object_store(tree, expected, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "nobody"),
            ("AWS_SECRET_ACCESS_KEY", "nothing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        files = open_store("s3://bucket")._files
        files.mkdir("bucket")
        for name in ("a.png", "b.jpg", "sub/c.tif"):
            files.put_file(str(tree / name), f"bucket/in/{name}")
        for n_done in (3, 0):
            outcome, _ = _bulk("s3://bucket/in", "s3://bucket/out/deep")
            assert (outcome.done, outcome.skipped) == (n_done, 3 - n_done)
        # What was sent without its stamp is known by its content.
        files.pipe_file("bucket/in/a.png", files.cat_file("bucket/in/a.png"))
        assert _bulk("s3://bucket/in/*", "s3://bucket/out/deep")[0].skipped == 2
        files.pipe_file("bucket/out/deep/a.png", b"mine")
        assert _bulk("s3://bucket/in", "s3://bucket/out/deep")[0].failed == (2,)
        assert _bulk("s3://bucket/in", "s3://bucket/out/deep", overwrite=True)[0].done == 3
        found = {name: files.cat_file(f"bucket/out/deep/{name}") for name in expected}
        assert found == expected
        names = files.find("bucket/out")
        assert len([n for n in names if "/.cadyq/" not in n]) == 3
        assert not [n for n in names if n.endswith(".tmp")]
    finally:
        server.stop()


# A real cluster of two machines, both of them this one. Everything that imports Ray runs in processes of its own.


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Call the command on a cluster: see `_Cluster`."""
    pytest.importorskip("ray")
    if os.name == "nt" or not Path("/proc").is_dir():
        pytest.skip("needs Linux")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    site = tmp_path_factory.mktemp("site")
    _install_grim(site)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(cadyq.__file__).parents[1]), str(site)]),
        "RAY_AUTH_MODE": "token",  # nobody else on this machine may use it
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    # Sockets lie in it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
        with _node(environment, *head), _node(environment, f"--address=127.0.0.1:{port}"):
            yield _Cluster(f"127.0.0.1:{port}", environment)


def _install_grim(site):
    """A protocol of another package: files of this machine, but whoever fetches a deadly one dies."""
    (site / "grim.py").write_text(
        "import os\n"
        "from fsspec.implementations.local import LocalFileSystem\n"
        "class Grim(LocalFileSystem):\n"
        "    protocol = 'grim'\n"
        "    @classmethod\n"
        "    def _strip_protocol(cls, path):\n"
        "        return super()._strip_protocol(path.removeprefix('grim://'))\n"
        "    def get_file(self, rpath, lpath, **options):\n"
        "        if 'deadly' in rpath:\n"
        "            os.kill(os.getpid(), 9)\n"
        "        super().get_file(rpath, lpath, **options)\n"
    )
    about = site / "grim-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: grim\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fsspec.specs]\ngrim = grim:Grim\n")


@contextmanager
def _node(environment, *options):
    """A machine with one CPU."""
    common = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *common, "--disable-usage-stats", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(seen))
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


class _Cluster:
    def __init__(self, address, environment):
        self.address, self._environment = address, environment

    def start(self, source, output, *options):
        """Start the command as a process."""
        command = [sys.executable, "-m", "cadyq", "bulk", str(source), str(output), "-r", "--json"]
        command += ["--model", MODEL, "--ray", self.address, *options]
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, source, output, *options):
        """Let the command end: (code, events by kind, stderr)."""
        out, err = (process := self.start(source, output, *options)).communicate(timeout=120)
        return process.returncode, _by_kind(out.splitlines()), err


def _by_kind(lines):
    events = {}
    for event in map(json.loads, lines):
        events.setdefault(event["event"], []).append(event)
    return events


@pytest.fixture
def many(tmp_path):
    """Enough pictures that something can happen in between: their folder, and the same bytes everywhere."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(scene(64, 64, seed=i)).save(folder / f"{i:02}.png")
    return folder


def test_on_a_cluster(cluster, tree, expected, tmp_path):
    (tree / "bad.png").write_text("bad")
    output = tmp_path / "out"
    code, events, err = cluster.run(_through_url(tree), _through_url(output))
    assert code == 3
    assert "Traceback" not in err
    assert len(events["done"]) == 3
    assert "bad.png" in events["failed"][0]["source"]
    assert _contents(output) == expected
    code, events, _ = cluster.run(tree, output)
    assert (len(events["skipped"]), len(events["failed"]), code) == (3, 1, 3)


def test_a_killed_worker_and_a_killed_driver_lose_nothing(cluster, many, tmp_path, capsys):
    assert cli.main(["upscale", str(many), "-o", str(tmp_path / "one"), "--model", MODEL]) == 0
    expected, output = _contents(tmp_path / "one"), tmp_path / "out"
    job = cluster.start(many, output)
    first = _next(job, "done")
    os.kill(int(first["worker"].rpartition(":")[2]), signal.SIGKILL)
    _next(job, "done")
    job.kill()
    job.communicate()
    found = _contents(output)
    assert 2 <= len(found) < len(expected)
    assert found.items() <= expected.items()
    time.sleep(0.5)
    job = cluster.start(many, output)
    first = _next(job, "done")
    os.kill(int(first["worker"].rpartition(":")[2]), signal.SIGKILL)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    ended = _by_kind(out.splitlines())["end"][0]
    assert ended["n_done"] + ended["n_skipped"] == len(expected)
    assert ended["n_skipped"] >= len(found)
    assert _contents(output) == expected


def _next(job, kind):
    for line in job.stdout:
        event = json.loads(line)
        if event["event"] == kind:
            return event
    pytest.fail(job.stderr.read())


def test_a_picture_that_kills_its_workers_is_given_up(cluster, tree, expected, tmp_path):
    (tree / "a.png").rename(tree / "deadly.png")
    output = tmp_path / "out"
    code, events, err = cluster.run(f"grim://{tree}", f"grim://{output}", "--retries", "1")
    assert code == 1, err
    (failed,) = events["failed"]
    assert failed["source"] == f"grim://{tree}/deadly.png"
    assert "2 workers died" in failed["message"]
    assert _contents(output) == {name: content for name, content in expected.items() if name != "a.png"}
    assert not _temporary(output)


def test_a_cluster_of_its_own(cluster, tree, expected, tmp_path):
    output = tmp_path / "out"
    jobs = [cluster.start(tree, output, "--ray", "--workers", "2")]
    # And another job on the other cluster, at the same time and into the same folder.
    jobs.append(cluster.start(tree, output))
    ended = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ended
    assert _contents(output) == expected
    assert _bulk(tree, output)[0].skipped == 3
    assert not _temporary(output)


def test_no_cluster_there():
    class Ray:
        def is_initialized(self):
            return False

        def init(self, **options):
            raise ConnectionError("nobody answers")

    with (
        pytest.raises(ArgumentError, match=r"ray is 'here:1', expected .* cluster; nobody answers"),
        running._connected(Ray(), Cluster("here:1")),
    ):
        pass
