"""The router: a flip is one step, a request keeps what it started on, and a closed router routes nothing."""

import pytest

from serve.routing import Route, Router, Table

BASE = Route("base", "sha256:b", "policy@base")
V1 = Route("v1", "sha256:1", "policy@v1")
V2 = Route("v2", "sha256:2", "policy@v2")


def test_a_new_router_is_not_ready_and_says_why() -> None:
    router = Router()
    assert router.current() is None
    assert router.why_not_ready() == "the gateway is starting"


def test_a_flip_changes_the_next_request_and_not_the_one_in_flight() -> None:
    router = Router()
    router.table = Table(V1, {"base": BASE, "v1": V1, "v2": V2}, None)
    route = router.current()
    assert route == V1
    with router.using(route):
        router.table = Table(V2, {"base": BASE, "v2": V2}, None)
        assert router.current() == V2
        assert router.pinned("v1") is None
        assert (router.in_flight("v1"), router.in_flight("v2")) == (1, 0)
    assert router.in_flight("v1") == 0


def test_a_request_that_fails_lets_go_of_its_version() -> None:
    router = Router()
    with pytest.raises(ZeroDivisionError), router.using(V1), router.using(V1):
        raise ZeroDivisionError
    assert router.in_flight("v1") == 0


def test_a_closed_router_routes_nothing_not_even_what_is_pinned() -> None:
    router = Router()
    router.table = Table(V1, {"base": BASE, "v1": V1}, None)
    assert router.why_not_ready() is None
    router.close("the engine ended")
    assert router.current() is None
    assert router.pinned("base") is None
    assert router.why_not_ready() == "the engine ended"
