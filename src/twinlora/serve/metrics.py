"""What /metrics shows, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from twinlora.serve.engine import PassReport

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server; nothing is shared with other servers of the process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        adapter = ["adapter"]
        self.requests = Counter(
            "twinlora_requests", "Requests by adapter and end.", ["adapter", "finish"], registry=registry
        )
        self.prompt_tokens = Counter("twinlora_prompt_tokens", "Tokens of prompts.", adapter, registry=registry)
        self.reused_tokens = Counter(
            "twinlora_reused_tokens", "Of them, those not computed again.", adapter, registry=registry
        )
        self.answer_tokens = Counter("twinlora_answer_tokens", "Tokens of answers.", adapter, registry=registry)
        self.first_token = Histogram(
            "twinlora_time_to_first_token_seconds", "From a request's arrival.", adapter, registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.refused = Counter(
            "twinlora_refused", "Requests answered with an error, by status.", ["status"], registry=registry
        )
        self.waiting = Gauge("twinlora_waiting_requests", "Requests without a slot.", registry=registry)
        self.running = Gauge("twinlora_running_requests", "Requests with a slot.", registry=registry)
        self.mixed = Gauge("twinlora_batch_adapters", "Different adapters in the last pass.", registry=registry)
        self.passes = Histogram("twinlora_pass_seconds", "One pass of the model.", buckets=_SECONDS, registry=registry)
        self.computed = Counter("twinlora_computed_tokens", "Tokens that went through the model.", registry=registry)
        self.adapter_bytes = Gauge("twinlora_adapter_bytes", "Adapters in memory.", registry=registry)

    def on_pass(self, report: PassReport) -> None:
        """The engine ran the model once."""
        self.mixed.set(report.adapters)
        self.passes.observe(report.seconds)
        self.computed.inc(report.tokens)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
