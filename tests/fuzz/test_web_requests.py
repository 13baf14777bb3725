"""Generated requests to the web app: every answer is one that its description allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import web_cases
from hypothesis import settings
from web_cases import Site, serving, sound

schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")

models = web_cases.models
EXAMPLES = max(10, settings().max_examples // 10)


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("jobs")) as made:
        id = made.submit(sound(), stems="vocals").json()["id"]
        made.finished(id)
        yield made


@pytest.fixture
def described(site: Site) -> Any:
    return schemathesis.openapi.from_url(f"{site.url}/api/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=EXAMPLES)
def test_every_answer_is_one_that_the_description_allows(case: Any) -> None:
    case.call_and_validate(timeout=60)
