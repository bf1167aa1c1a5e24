"""Random requests, right and wrong, made from our own OpenAPI document: no answer is undocumented or an error of ours."""

import pytest

from tests.serve.conftest import ADMIN, TOKEN

schemathesis = pytest.importorskip("schemathesis")


def test_the_document_is_kept(running):
    from hypothesis import HealthCheck, Phase, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    seen = set()

    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=12, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
                  suppress_health_check=list(HealthCheck), derandomize=True)  # fmt: skip
        def run(case):
            token = ADMIN if case.path.startswith("/admin") else TOKEN
            response = case.call(headers={"Authorization": f"Bearer {token}"})
            seen.add((case.path, response.status_code // 100))
            case.validate_response(response, checks=checks)

        from hypothesis import given

        given(case=operation.as_strategy())(run)()
    assert ("/v1/models", 2) in seen
    assert ("/v1/chat/completions", 4) in seen
    running.settled()
