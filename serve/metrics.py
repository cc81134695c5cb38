"""What `/metrics` shows of the gateway. Labels are bounded: few endpoints and outcomes, the latest eight versions."""

from collections import OrderedDict

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
VERSIONS_KEPT = 8

REQUESTS = Counter(
    "thumbwheel_gateway_requests_total", "Requests, by how they ended.", ("endpoint", "version", "outcome")
)
FIRST_TOKEN = Histogram(
    "thumbwheel_gateway_time_to_first_token_seconds",
    "From the arrival of a streaming request to its first token.",
    ("version",),
    buckets=_SECONDS,
)
DURATION = Histogram(
    "thumbwheel_gateway_request_duration_seconds",
    "From the arrival of a request to the end of its answer.",
    ("version",),
    buckets=_SECONDS,
)
TOKENS = Counter("thumbwheel_gateway_tokens_total", "Tokens, kind prompt or sampled.", ("version", "kind"))
FEEDBACK = Counter("thumbwheel_gateway_feedback_total", "Votes, by what became of them.", ("rating", "result"))
APPEND_FAILURES = Counter("thumbwheel_gateway_log_append_failures_total", "Exchanges that the log did not take.")
LOG_LATE = Counter(
    "thumbwheel_gateway_log_late_total", "Answers that went out before the log, given its time, had their exchange."
)
IN_FLIGHT = Gauge("thumbwheel_gateway_in_flight_requests", "Requests that are being answered.")

_versions: OrderedDict[str, None] = OrderedDict()


def count_exchange(
    endpoint: str, version: str, outcome: str, first_token_s: float | None, duration_s: float, tokens: tuple[int, int]
) -> None:
    """Count one exchange with the engine; `tokens` are prompt and sampled."""
    _keep(version)
    REQUESTS.labels(endpoint, version, outcome).inc()
    DURATION.labels(version).observe(duration_s)
    if first_token_s is not None:
        FIRST_TOKEN.labels(version).observe(first_token_s)
    TOKENS.labels(version, "prompt").inc(tokens[0])
    TOKENS.labels(version, "sampled").inc(tokens[1])


def _keep(version: str) -> None:
    """Drop the series of the version that was longest without a request, so that releases do not pile up."""
    _versions[version] = None
    _versions.move_to_end(version)
    if len(_versions) > VERSIONS_KEPT:
        old, _ = _versions.popitem(last=False)
        for metric in (REQUESTS, FIRST_TOKEN, DURATION, TOKENS):
            metric.remove_by_labels({"version": old})
