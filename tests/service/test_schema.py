"""The description of the API holds against what schemathesis makes up from it."""

import contextlib

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

pytest.importorskip("fastapi", reason="needs the extra [web]")
schemathesis = pytest.importorskip("schemathesis", reason="needs the extra [web-test]")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

# Bytes that are made up are no picture, and ids that are made up no job: refusing them is right.
REFUSING_IS_RIGHT = [checks.positive_data_acceptance]
FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def _operations(service):
    schema = schemathesis.openapi.from_url(f"{service}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=str)
def test_every_answer_is_as_described(service, mode):
    tried = set()

    def validate(case):
        tried.add(case.operation.label)
        case.call_and_validate(excluded_checks=REFUSING_IS_RIGHT, timeout=30)

    for operation in _operations(service):
        # What takes no argument cannot be given a wrong one.
        with contextlib.suppress(Unsatisfiable):
            FEW(given(operation.as_strategy(generation_mode=mode))(validate))()
    assert len(tried) >= (10 if mode is schemathesis.GenerationMode.POSITIVE else 2), tried
