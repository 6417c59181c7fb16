"""Numbers at /metrics are those of what happened."""

from __future__ import annotations

from fake_engine import FakeEngine
from fastgen.output import Stats
from fastgen.serve.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families
from server_lab import serving, wait_until


def test_counts_and_times() -> None:
    with serving(FakeEngine(step_s=0.02)) as served:
        for _ in range(3):
            assert served.complete(max_tokens=10, n=2, ignore_eos=True).status == 200
        assert served.complete(max_tokens=0).status == 400
        assert served.get("/nothing/at/all").status == 404
        assert served.metric("fastgen_prompt_tokens_total") == 3 * 5
        assert served.metric("fastgen_generated_tokens_total") == 3 * 2 * 10
        assert served.metric('fastgen_sequences_total{reason="length"}') == 6
        assert served.metric("fastgen_time_to_first_token_seconds_count") == 3
        assert served.metric("fastgen_inter_token_latency_seconds_count") == 3 * 2 * 9
        assert served.metric("fastgen_request_seconds_count") == 6
        assert served.metric("fastgen_step_tokens_sum") == 3 * (5 + 2 * 10)
        # A step sleeps 20 ms: times are at least that, and not of another order.
        assert 3 * 0.02 <= served.metric("fastgen_time_to_first_token_seconds_sum") < 3
        assert 54 * 0.019 <= served.metric("fastgen_inter_token_latency_seconds_sum") < 54 * 0.2
        assert 6 * 0.2 <= served.metric("fastgen_request_seconds_sum") < 20
        assert served.metric('fastgen_http_responses_total{route="/v1/completions",status="200"}') == 3
        assert served.metric('fastgen_http_responses_total{route="/v1/completions",status="400"}') == 1
        assert served.metric('fastgen_http_responses_total{route="other",status="404"}') == 1


def test_gauges_while_it_runs() -> None:
    with serving(FakeEngine(step_s=0.02)) as served:
        connection = served.send(
            "/v1/completions", {"prompt": "x" * 100, "max_tokens": 1000, "ignore_eos": True}
        )
        wait_until(lambda: served.metric("fastgen_running") == 1)
        assert served.metric("fastgen_blocks_used") >= 7
        assert served.metric("fastgen_blocks_total") == 4096
        assert 0 < served.metric("fastgen_cache_usage_ratio") < 0.1
        stats = served.get("/stats").json
        assert (stats["running"], stats["requests"], stats["blocks_total"]) == (1, 1, 4096)
        connection.close()
        wait_until(lambda: served.metric("fastgen_running") == 0)


def test_prometheus_can_read_it() -> None:
    with serving() as served:
        served.complete()
        reply = served.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
        assert families["fastgen_time_to_first_token_seconds"].type == "histogram"
        assert families["fastgen_preempted"].type == "counter"
        assert all(family.documentation for name, family in families.items() if not name.endswith("_created"))


def test_requests_that_end_early_are_counted() -> None:
    with serving(FakeEngine(step_s=0.02)) as served:
        body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 3}
        connection = served.send("/v1/completions", body)
        wait_until(lambda: served.metric("fastgen_running") > 0)
        connection.close()
        wait_until(served.is_idle)
        wait_until(lambda: served.metric('fastgen_sequences_total{reason="abort"}') == 3)
        assert served.metric("fastgen_request_seconds_count") == 3


def test_steps_without_news_count() -> None:
    """A long prompt, chunk by chunk: each is a forward."""
    metrics = Metrics(Stats)
    for _ in range(5):
        metrics.stepped([], Stats(batch_tokens=32), 0.0)
    assert b"fastgen_step_tokens_sum 160.0" in metrics.exposition()
