"""What the gateway counts, for Prometheus."""

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from cluster.gateway.limits import Lane

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Calls by method and code, their seconds, and what runs and waits in each lane."""

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter("repertory_calls", "Calls that ended.", ["method", "code"], registry=self._registry)
        self._seconds = Histogram(
            "repertory_call_seconds", "Time of a call, waiting included.", ["method"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        waiting = Gauge("repertory_waiting_calls", "Calls that wait.", ["lane"], registry=self._registry)
        used = Gauge("repertory_tokens", "Estimated tokens under way.", ["lane"], registry=self._registry)
        for name, lane in lanes.items():
            waiting.labels(name).set_function(partial(getattr, lane, "waiting"))
            used.labels(name).set_function(partial(getattr, lane, "used"))

    def ended(self, method: str, code: str, seconds: float) -> None:
        """Count one call."""
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Answer Prometheus at an address; what is returned ends it. Raises OSError when the address is taken."""
        server, thread = start_http_server(port, host, self._registry)

        def end() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return end

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
