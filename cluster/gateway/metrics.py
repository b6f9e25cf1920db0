"""What the gateway counts, for Prometheus."""

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cluster.gateway.limits import Lane
from cluster.gateway.routed import RoutedPolicy
from protocols.policy import SampleDelta, SampleResponse

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Calls by method and code, their seconds and drawn tokens, and what runs and waits in each lane."""

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter("repertory_calls", "Calls that ended.", ["method", "code"], registry=self.registry)
        self._seconds = Histogram(
            "repertory_call_seconds", "Time of a call, waiting included.", ["method"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._drawn = Counter(
            "repertory_drawn_tokens", "Tokens that policies drew for callers.", ["method"], registry=self.registry
        )
        self._routed = Counter(
            "repertory_routed", "Prompts that a router sent to a policy.", ["model"], registry=self.registry
        )
        self._down = Counter(
            "repertory_routed_past", "Prompts that went past a policy that was down.", ["model"],
            registry=self.registry,
        )  # fmt: skip
        waiting = Gauge("repertory_waiting_calls", "Calls that wait.", ["lane"], registry=self.registry)
        used = Gauge("repertory_tokens", "Estimated tokens under way.", ["lane"], registry=self.registry)
        for name, lane in lanes.items():
            waiting.labels(name).set_function(partial(getattr, lane, "waiting"))
            used.labels(name).set_function(partial(getattr, lane, "used"))

    def ended(self, method: str, code: str, seconds: float) -> None:
        """Count one call."""
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def drew(self, method: str, answer: object) -> None:
        """Count the tokens that were drawn for an answer, or for a piece of one."""
        if isinstance(answer, SampleDelta):
            self._drawn.labels(method).inc(len(answer.tokens))
        elif isinstance(answer, SampleResponse):
            completions = (one for result in answer.results for one in result.completions)
            self._drawn.labels(method).inc(sum(len(one.tokens) for one in completions))

    def routed(self, policy: RoutedPolicy) -> None:
        """Count whom the prompts of a call went to, and past."""
        for decision in policy.decisions:
            self._routed.labels(decision.model).inc()
            for name in decision.down:
                self._down.labels(name).inc()

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Answer Prometheus at an address; what is returned ends it. Raises OSError when the address is taken."""
        server, thread = start_http_server(port, host, self.registry)

        def end() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return end
