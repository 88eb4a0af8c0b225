"""One service for all tests that do not need limits of their own."""

import pytest
from services import serving


@pytest.fixture(scope="session")
def service():
    pytest.importorskip("fastapi", reason="needs the extra [web]")
    with serving() as address:
        yield address
