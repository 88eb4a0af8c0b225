"""Real services on loopback: what is tested is what clients meet."""

import contextlib
import io
import socket
import threading
import time

from networks import scene
from PIL import Image

MODEL = "srresnet-x4-cadyq"


def png(height=48, width=64, seed=0, form="PNG"):
    """The bytes of a small picture."""
    buffer = io.BytesIO()
    Image.fromarray(scene(height, width, seed)).save(buffer, form)
    return buffer.getvalue()


@contextlib.contextmanager
def serving(**settings):
    """A service on a free port; yields its address."""
    import uvicorn

    from cadyq.service.app import create_app
    from cadyq.service.settings import Settings

    app = create_app(Settings(models=(MODEL,), threads=1, **settings))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def until(condition, seconds=20):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
