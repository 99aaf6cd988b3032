"""Schemathesis reads the OpenAPI description and finds no request that the server itself fails on."""

import io
import json
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from incipit.serve.http import logs
from incipit.serve.http.app import Options
from incipit.serve.http.keys import Keys

KEY = "0123456789abcdef"
CALM = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.slow
def test_no_request_of_the_description_makes_the_server_fail(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while a stranger's package is imported and at work
        schemathesis = pytest.importorskip("schemathesis")
        site = make(Options(admin=Keys.of([KEY], "keys")))
        schema = schemathesis.openapi.from_dict(site.ask("GET", "/openapi.json").json())
        count = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            strategy = st.one_of(
                operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode
            )
            count += 1

            @CALM
            @given(case=strategy)
            def fails_not(case: Any) -> None:
                answered(site, case)

            fails_not()
    assert count == 13  # every address of the description
    assert site.store.pins == 0


def answered(site: Any, case: Any) -> None:
    path = case.formatted_path
    more: dict[str, Any] = {"headers": {"authorization": f"Bearer {KEY}"}}
    if case.method in ("POST", "PUT"):
        try:
            content = json.dumps(
                case.body if not isinstance(case.body, bytes) else case.body.decode("latin-1")
            )
        except (TypeError, ValueError):
            content = "{"
        more |= {
            "content": content.encode("utf-8", "surrogatepass"),
            "headers": {**more["headers"], "content-type": "application/json"},
        }
    said = io.StringIO()
    undo = logs.turn_on(said)
    try:
        reply = site.ask(case.method, path, **more)
    finally:
        undo()
    assert reply.status_code < 500, (case.method, path, more, reply.text, said.getvalue())
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(CALM, max_examples=60)
@given(data=st.data())
def test_any_json_in_any_place(shared: Any, data: Any) -> None:
    path, right = data.draw(
        st.sampled_from(
            [
                ("/v1/completions", {"model": "mood", "prompt": "x"}),
                ("/v1/chat/completions", {"model": "talk", "messages": [{"role": "user", "content": "x"}]}),
                ("/v1/classify", {"model": "pair", "input": {"a": "x", "b": "y"}}),
            ]
        )
    )
    key = data.draw(
        st.sampled_from([*right, "stop", "temperature", "n", "stream", "logprobs", "stream_options", "seed"])
    )
    reply = shared.post(path, **{**right, key: data.draw(ANY)})
    assert reply.status_code in (200, 400, 404, 413, 422), reply.text
    assert shared.store.pins == 0
