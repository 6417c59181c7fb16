"""The HTTP layer against requests made from its own OpenAPI document, right and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, given, seed, settings
from server_lab import Served, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
ROUTES = {
    "POST /v1/completions": 80,
    "POST /v1/chat/completions": 80,
    "POST /v1/embeddings": 40,
    "GET /v1/models": 5,
    "GET /v1/models/{model_id}": 30,
    "GET /health": 5,
    "GET /stats": 5,
    "GET /metrics": 5,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine(), max_tokens=64) as served:
        yield served
        assert served.is_idle()


@pytest.fixture(scope="module")
def operations(served: Served) -> dict[str, Any]:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    return {each.ok().label: each.ok() for each in document.get_all_operations()}


def test_every_route_is_documented(operations: dict[str, Any]) -> None:
    assert set(operations) == set(ROUTES)


# Only a route with a body can be asked wrongly.
MODES = [
    (route, mode)
    for route in ROUTES
    for mode in ("positive", "negative")
    if "POST" in route or mode == "positive"
]


@pytest.mark.parametrize(("route", "mode"), MODES)
def test_answers_are_as_documented(operations: dict[str, Any], route: str, mode: str) -> None:
    statuses: set[int] = set()
    cases = operations[route].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @seed(0)
    @settings(
        max_examples=ROUTES[route],
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        if mode == "positive" and isinstance(case.body, dict):
            case.body.pop("model", None)  # no text of chance is the name of a model
        response = case.call(timeout=20)
        statuses.add(response.status_code)
        # A body may fit its schema and still ask for too much, such as tokens.
        case.validate_response(response, excluded_checks=[schemathesis.checks.positive_data_acceptance])

    ask()
    assert statuses <= {200, 400, 404}
    assert {"positive": 200, "negative": 400}[mode] in statuses or "{" in route
