from twinlora.serve.guard import RateLimit, is_local


def test_local_addresses():
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "localhost:8000", "127.0.0.1:80", "[::1]:8000")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "evil.example:8000", "localhost.evil.example", "")))


def test_rates_are_counted_for_each_client():
    limit = RateLimit(2.0)
    assert [limit.wait("a", 0.0) == 0 for _ in range(5)] == [True] * 4 + [False]
    assert limit.wait("b", 0.0) == 0
    assert 0 < limit.wait("a", 0.1) <= 0.5
    assert limit.wait("a", 0.6) == 0
    assert RateLimit(0).wait("a", 0.0) == 0
