"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Measures:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "arskit_requests", "HTTP requests answered.", ["route", "status"], registry=registry
        )
        self.first_token = Histogram(
            "arskit_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "arskit_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry
        )
        self.tokens = Counter(
            "arskit_generated_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self.speed = Histogram(
            "arskit_tokens_per_second",
            "Tokens a second of an answer, all its choices together.",
            ["model"],
            buckets=(1, 3, 10, 30, 100, 300, 1000, 3000),
            registry=registry,
        )
        self.cancellations = Counter(
            "arskit_cancellations",
            "Requests whose client left or whose time was up.",
            ["model"],
            registry=registry,
        )
        self.failures = Counter(
            "arskit_failures", "Requests that the engine failed on.", ["model"], registry=registry
        )
        self.refused = Counter(
            "arskit_queue_full", "Requests refused for a full queue.", ["model"], registry=registry
        )
        self.waiting = Gauge(
            "arskit_waiting_sequences", "Sequences in the queue.", ["model"], registry=registry
        )
        self.active = Gauge(
            "arskit_active_sequences", "Sequences being computed.", ["model"], registry=registry
        )
