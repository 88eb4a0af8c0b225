"""The downloader against a server on this machine: whole, cut off, resumed, damaged, absent."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from cadyq.data.download import ARCHIVES, Archive, download, fetch
from cadyq.errors import ArgumentError, DataError


def archive_bytes(n=3):
    """A zip of ``n`` pictures in a folder, with a file that is none."""
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(out, "w") as file:
        for i in range(n):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture, "PNG")
            file.writestr(f"DIV2K_train_HR/{i + 1:04}.png", picture.getvalue())
        file.writestr("DIV2K_train_HR/.hidden", b"")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves ``content``; knows ranges unless told not to; breaks off after ``limit`` bytes once."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        if self.path != "/a.zip":
            self.send_error(404)
            return
        start = 0
        if server.knows_ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        limit, server.limit = server.limit, None
        self.wfile.write(body[:limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.limit, server.knows_ranges, server.ranges = archive_bytes(), None, True, []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive(server, path="a.zip", **changes):
    values = {
        "folder": "DIV2K_train_HR",
        "url": f"http://127.0.0.1:{server.server_port}/{path}",
        "md5": hashlib.md5(server.content).hexdigest(),
        "n_pictures": 3,
        **changes,
    }
    return Archive(**values)


def test_pictures_lie_where_everybody_has_them(server, tmp_path):
    seen = []
    folder = fetch(archive(server), tmp_path, lambda done, total: seen.append((done, total)))
    assert sorted(p.name for p in folder.iterdir()) == ["0001.png", "0002.png", "0003.png"]
    assert folder == tmp_path / "DIV2K_train_HR"
    assert seen[-1] == (len(server.content), len(server.content))
    assert [p.name for p in tmp_path.iterdir()] == ["DIV2K_train_HR"]
    fetch(archive(server), tmp_path)
    assert len(server.ranges) == 1  # nothing was fetched again


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_interrupted_download_goes_on(server, tmp_path, knows_ranges):
    server.limit, server.knows_ranges = 5000, knows_ranges
    with pytest.raises(DataError, match="run again to go on"):
        fetch(archive(server), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["DIV2K_train_HR.zip.part"]
    folder = fetch(archive(server), tmp_path)
    assert len(list(folder.iterdir())) == 3
    assert server.ranges == [None, "bytes=5000-"]


def test_killed_between_transfer_and_unpacking(server, tmp_path):
    (tmp_path / "DIV2K_train_HR.zip.part").write_bytes(server.content)
    (tmp_path / ".DIV2K_train_HR.tmp").mkdir()
    (tmp_path / ".DIV2K_train_HR.tmp" / "0001.png").write_bytes(b"half")
    folder = fetch(archive(server), tmp_path)
    assert len(list(folder.iterdir())) == 3 and [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(DataError, match="MD5"):
        fetch(archive(server, md5="0" * 32), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_number_of_pictures_leaves_no_folder(server, tmp_path):
    with pytest.raises(DataError, match="holds 3 pictures, expected 4"):
        fetch(archive(server, n_pictures=4), tmp_path)
    assert not (tmp_path / "DIV2K_train_HR").exists()


def test_a_users_folder_is_not_touched(server, tmp_path):
    (tmp_path / "DIV2K_train_HR").mkdir()
    (tmp_path / "DIV2K_train_HR" / "mine.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="move it away"):
        fetch(archive(server), tmp_path)
    assert (tmp_path / "DIV2K_train_HR" / "mine.png").read_bytes() == b"mine"


def test_absent_file_and_absent_server_are_told(server, tmp_path):
    with pytest.raises(DataError, match="404"):
        fetch(archive(server, "b.zip"), tmp_path)
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(archive(server, url="http://127.0.0.1:9/a.zip"), tmp_path)


def test_names_are_known_ones(tmp_path):
    with pytest.raises(ArgumentError, match="DIV2K"):
        download("DIV8K", tmp_path)
    assert [a.n_pictures for a in ARCHIVES["DIV2K"]] == [800, 100]


def test_command_fetches_and_prints_folders(server, tmp_path, monkeypatch, capsys):
    from cadyq.cli import main

    monkeypatch.setitem(ARCHIVES, "DIV2K", (archive(server),))
    assert main(["download", "DIV2K", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "DIV2K_train_HR")
    assert main(["download", "DIV8K", str(tmp_path)]) == ArgumentError.exit_code
    assert "DIV2K" in capsys.readouterr().err
