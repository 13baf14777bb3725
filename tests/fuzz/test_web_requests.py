"""Generated requests to the web app: every answer is one that its description allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import web_cases
from hypothesis import given, settings
from web_cases import Site, serving, sound

schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")


models = web_cases.models
TOKEN = "a token of some length"
EXAMPLES = max(10, settings().max_examples // 10)
ROUTES = [
    ("GET", "/api/server"),
    ("GET", "/api/jobs"),
    ("POST", "/api/jobs"),
    ("GET", "/api/jobs/{id}"),
    ("DELETE", "/api/jobs/{id}"),
    ("POST", "/api/jobs/{id}/cancel"),
    ("GET", "/api/jobs/{id}/stems/{stem}"),
    ("GET", "/api/jobs/{id}/zip"),
    ("GET", "/api/jobs/{id}/page"),
    ("POST", "/api/login"),
]


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("jobs"), token=TOKEN, works=False) as made:
        made.submit(sound(), stems="vocals")
        yield made


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[" ".join(route) for route in ROUTES])
def test_every_answer_is_one_that_the_description_allows(site: Site, method: str, path: str) -> None:
    described = schemathesis.openapi.from_url(
        f"{site.url}/api/openapi.json", headers=dict(site.session.headers)
    )

    @given(case=described[path][method].as_strategy())
    @settings(max_examples=EXAMPLES)
    def check(case: Any) -> None:
        case.call_and_validate(
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=60,
            # Random bytes are a valid form, but not a song. The token is checked in test_web_hostile.py.
            excluded_checks=[checks.positive_data_acceptance, checks.ignored_auth],
        )

    check()
