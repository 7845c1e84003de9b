"""One host's budget: arithmetic on a clock of our own."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lavic.shards.ratelimit.host_limiter import UNLIMITED, Grant, HostLimiter, HostReport, Limits


def ask(host: HostLimiter, now: float, worker: str = "a", **seen: object) -> Grant:
    return host.sync(worker, HostReport(**{"version": host.version, "waiting": 0, **seen}), now)[0]  # type: ignore[arg-type]


def times(grant: Grant, now: float) -> list[float]:
    return [now + grant.start + n * grant.interval for n in range(grant.slots)]


def test_slots_of_all_workers_add_up_to_the_rate_and_never_to_more() -> None:
    host, now = HostLimiter(Limits(rate=100.0), 0.0), 0.0
    slots: list[float] = []
    while now < 10:
        for worker in "abcd":
            slots += times(ask(host, now, worker, waiting=8), now)
        now += 0.01
    slots.sort()
    assert all(later - earlier == pytest.approx(0.01) for earlier, later in pairwise(slots))
    assert len([at for at in slots if at < 10]) == pytest.approx(1000, abs=2)


def test_an_idle_host_gathers_no_burst() -> None:
    host = HostLimiter(Limits(rate=100.0), 0.0)
    ask(host, 0.0, waiting=1)
    grant = ask(host, 60.0, waiting=1000)
    assert grant.slots <= 50 and len([at for at in times(grant, 60.0) if at <= 60.0]) <= 11


def test_without_a_limit_nothing_is_leased() -> None:
    grant = ask(HostLimiter(Limits(), 0.0), 0.0, waiting=9)
    assert grant.unlimited and not grant.slots and grant.connections > 1_000_000


def test_a_429_halves_the_rate_once_for_all_that_was_sent_before_it_was_known() -> None:
    host = HostLimiter(Limits(rate=100.0, backoff=0.5), 0.0)
    version = ask(host, 1.0, waiting=1).version
    for worker in "abc":
        ask(host, 1.0, worker)
    grant, affected = host.sync("a", HostReport(version=version, throttled=True), 1.1)
    assert affected == {"b", "c"} and grant.pause == pytest.approx(0.5) and grant.version > version
    for worker in "bc":
        host.sync(worker, HostReport(version=version, throttled=True), 1.2)
    assert host.rate == pytest.approx(50)
    assert ask(host, 1.7, waiting=1).interval == pytest.approx(1 / 50, rel=0.01)


def test_the_rate_comes_back_slowly_and_pauses_grow_until_something_succeeds() -> None:
    host = HostLimiter(Limits(rate=100.0, backoff=0.5), 0.0)
    closed = [ask(host, now, throttled=True).pause for now in (1.0, 2.0, 4.0)]
    assert closed == pytest.approx([0.5, 1.0, 2.0])
    assert 12 < host.rate < 14
    ask(host, 6.0, successes=1)
    assert ask(host, 6.5, throttled=True).pause == pytest.approx(0.5)
    low = host.rate
    rates = []
    for now in range(7, 80):
        ask(host, float(now), waiting=1, successes=1)
        rates.append(host.rate)
    assert rates == sorted(rates) and rates[9] - low == pytest.approx(100 / 6, rel=0.1) and rates[-1] == 100.0


def test_without_a_limit_the_rate_that_was_measured_is_halved_and_freed_again() -> None:
    host = HostLimiter(Limits(), 0.0)
    for now in range(1, 11):
        assert ask(host, now / 2, sent=200).unlimited
    ask(host, 5.0, throttled=True)
    assert 180 <= host.rate <= 230
    for now in range(6, 200):
        grant = ask(host, float(now), waiting=1)
    assert grant.unlimited and host.rate == UNLIMITED


def test_retry_after_holds_for_every_worker_and_from_stale_answers_too() -> None:
    host = HostLimiter(Limits(rate=100.0, patience=60.0), 0.0)
    ask(host, 0.0)
    ask(host, 0.0, "b")
    ask(host, 1.0, throttled=True, retry_after=10.0)
    rate = host.rate
    host.sync("b", HostReport(version=0, throttled=True, retry_after=20.0), 2.0)
    assert host.rate == rate
    grant = ask(host, 3.0, "c", waiting=5)
    assert grant.pause == pytest.approx(19.0) and not grant.slots and not grant.give_up and grant.kind == "unasked"
    assert not ask(host, 21.9, waiting=5).slots and ask(host, 22.1, waiting=5).slots
    ask(host, 23.0, throttled=True, retry_after=3600.0)
    assert ask(host, 24.0).give_up


def test_a_host_that_only_fails_is_left_alone_for_longer_and_longer() -> None:
    host, now = HostLimiter(Limits(backoff=0.5, patience=5.0), 0.0), 0.0
    ask(host, now, waiting=1)
    assert not ask(host, now, connect_failures=19, kind="connect", reason="refused").pause
    pauses = [ask(host, now, connect_failures=1, kind="connect", reason="refused")]
    for _ in range(4):
        now = host.paused_until + 0.01
        probe = ask(host, now, waiting=5)
        assert probe.slots == 1 and not probe.pause
        assert ask(host, now, "b", waiting=5).pause and not ask(host, now, "b", waiting=5).slots
        pauses.append(ask(host, now, connect_failures=1, kind="connect", reason="refused"))
    assert [grant.pause for grant in pauses] == pytest.approx([2, 4, 8, 16, 32])
    assert [grant.give_up for grant in pauses] == [False, False, True, True, True]
    assert pauses[0].kind == "connect" and pauses[0].reason == "refused"
    now = host.paused_until + 0.01
    ask(host, now, "b")
    ask(host, now, waiting=1)
    _, affected = host.sync("a", HostReport(version=host.version, successes=1), now)
    assert affected == {"b"} and ask(host, now, "b", waiting=1).unlimited


def test_an_answer_between_them_keeps_failures_from_adding_up() -> None:
    host = HostLimiter(Limits(), 0.0)
    ask(host, 0.0)
    for now in range(50):
        assert ask(
            host, float(now), successes=1, failures=15, connect_failures=15, kind="timeout", reason="slow"
        ).unlimited


def test_a_host_that_was_there_before_is_expected_back() -> None:
    host = HostLimiter(Limits(patience=1.0), 0.0)
    ask(host, 0.0, successes=1)
    failure = ask(host, 1.0, connect_failures=20, kind="connect", reason="refused")
    assert failure.give_up and failure.kind == "unasked" and failure.reason == "refused"


def test_photos_that_fail_slow_a_host_down_and_never_close_it() -> None:
    host = HostLimiter(Limits(rate=50.0, patience=60.0), 0.0)
    grants = [ask(host, 0.0, waiting=9, failures=10, kind="http_error", reason="HTTP 500") for _ in range(8)]
    assert [round(1 / grant.interval) for grant in grants] == [50, 25, 25, 12, 12, 6, 6, 6]
    assert [grant.scatter for grant in grants] == [False] + 7 * [True] and not any(grant.pause for grant in grants)
    assert not ask(host, 59.0, waiting=9).probe
    doubtful = ask(host, 61.0, waiting=9)
    assert doubtful.probe and doubtful.kind == "unasked" and "HTTP 500" in doubtful.reason and doubtful.slots
    _, affected = host.sync("b", HostReport(version=host.version, successes=1), 62.0)
    assert affected == {"a"} and 1 / ask(host, 62.0, waiting=9).interval == pytest.approx(50)
    free = HostLimiter(Limits(), 0.0)
    assert ask(free, 0.0, waiting=9, failures=19).unlimited and not ask(free, 0.0, waiting=9, failures=1).unlimited
    assert ask(free, 0.0, waiting=9, successes=1).unlimited


def test_a_few_refusals_among_many_good_answers_are_the_photos_own() -> None:
    host = HostLimiter(Limits(rate=50.0), 0.0)
    for now in range(100):
        assert not ask(host, now / 10, successes=19, throttled=1).pause
    assert host.rate == 50.0
    closed = [ask(host, now / 10, successes=1, throttled=19).pause for now in range(100, 104)]
    assert any(closed) and host.rate < 50.0


def test_refusals_that_pass_are_the_hosts_however_few() -> None:
    host = HostLimiter(Limits(rate=50.0), 0.0)
    grants = [ask(host, now / 10, successes=18, throttled=2, recovered=2) for now in range(3)]
    assert [grant.pause > 0 for grant in grants] == [False, True, True] and host.rate == pytest.approx(25, abs=1)


def test_connections_are_parted_and_never_more_than_the_limit() -> None:
    host = HostLimiter(Limits(connections=10), 0.0)
    assert ask(host, 0.0, waiting=20).connections == 10
    grant, affected = host.sync("b", HostReport(version=0, waiting=20), 0.0)
    assert grant.connections == 0 and affected == {"a"}
    # The first still has eight in flight: what it holds above its part is not given away before they are done.
    grant, affected = host.sync("a", HostReport(version=0, in_flight=8, waiting=20), 0.1)
    assert grant.connections == 5 and affected == {"b"}
    assert ask(host, 0.1, "b", waiting=20).connections == 2
    assert host.sync("a", HostReport(version=0, in_flight=5), 0.2)[1] == {"b"}
    assert ask(host, 0.2, "b", in_flight=2).connections == 5
    assert host.remove_worker("a") == {"b"} and ask(host, 0.3, "b").connections == 10


def test_a_worker_that_died_gives_its_part_back() -> None:
    host = HostLimiter(Limits(connections=4), 0.0)
    ask(host, 0.0, "dead")
    assert ask(host, 1.0, "b").connections == 0
    assert ask(host, 30.0, "b").connections == 4


def test_a_delay_that_the_host_asks_for_is_a_limit() -> None:
    host = HostLimiter(Limits(), 0.0)
    ask(host, 0.0)
    assert host.limit_rate(0.1) == {"a"} and host.limit_rate(5.0) == set()
    grant = ask(host, 1.0, waiting=9)
    assert not grant.unlimited and grant.slots == 1
    assert ask(host, 1.0, waiting=9).start == pytest.approx(10.0, abs=0.2)
    # It still counts when nobody has asked the host for a moment.
    host.remove_worker("a")
    assert not host.idle(15.0) and not host.idle(20.0) and host.idle(21.5)


def test_a_delay_longer_than_patience_ends_the_photos() -> None:
    host = HostLimiter(Limits(rate=50.0, patience=60.0), 0.0)
    host.limit_rate(1 / 86400)
    grant = ask(host, 1.0, waiting=9)
    assert grant.give_up and grant.kind == "throttled" and not grant.slots and "86,400 s" in grant.reason
    # A lower rate of our own is no wish of the host's.
    ours = HostLimiter(Limits(rate=0.01, patience=60.0), 0.0)
    assert ask(ours, 1.0, waiting=9).slots == 1
