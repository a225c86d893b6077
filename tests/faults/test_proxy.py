"""The servers and the proxy do what the fault tests take for granted."""

import time
from collections.abc import Iterator

import pytest
import s3fs

from tests.faults import servers
from tests.faults.proxy import FaultProxy


@pytest.fixture
def proxy(server: servers.S3Server) -> Iterator[FaultProxy]:
    one = FaultProxy(server.port)
    yield one
    one.close()


def client(port: int) -> s3fs.S3FileSystem:
    # Attempts of the client would hide the faults from its user.
    options = servers.settings(port, timeout_s=1)
    options["config_kwargs"]["retries"] = {"max_attempts": 0, "mode": "standard"}
    return s3fs.S3FileSystem(**options, skip_instance_cache=True)


def test_bytes_pass_both_ways(proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 40_000  # 10 MB: more than a buffer, and several parts
    fs = client(proxy.port)
    fs.pipe_file("bucket/a/x", data)
    assert fs.cat_file("bucket/a/x") == data
    assert fs.cat_file("bucket/a/x", start=1000, end=3000) == data[1000:3000]
    assert fs.ls("bucket/a") == ["bucket/a/x"]
    assert proxy.seen["requests"] == len(proxy.log) >= 4
    assert any(line.startswith("GET /bucket/a/x") for line in proxy.log)


def test_every_fault_strikes(proxy: FaultProxy) -> None:
    fs = client(proxy.port)
    fs.pipe_file("bucket/y", bytes(100_000))
    fs.retries = 1
    faults = {
        "throttled": (1.0, "throttled"),
        "cut": (1.0, "cut"),
        "refuses": (True, "refused"),
        "hangs": (True, "hung"),
    }
    for attribute, (value, name) in faults.items():
        setattr(proxy, attribute, value)
        with pytest.raises(Exception):  # noqa: B017 - clients have many kinds for the same trouble
            fs.cat_file("bucket/y")
        assert proxy.seen[name] > 0, name
        proxy.clear()
        assert len(fs.cat_file("bucket/y")) == 100_000, f"after {name} all is well again"


def test_faults_strike_only_where_they_should(proxy: FaultProxy) -> None:
    fs = client(proxy.port)
    proxy.only, proxy.refuses = r"GET .*\.tar", True
    fs.pipe_file("bucket/z.tar", b"1234")
    fs.pipe_file("bucket/z.json", b"1234")
    assert fs.cat_file("bucket/z.json") == b"1234"
    fs.retries = 1
    with pytest.raises(Exception):  # noqa: B017
        fs.cat_file("bucket/z.tar")


def test_latency_and_rate(proxy: FaultProxy) -> None:
    fs = client(proxy.port)
    fs.pipe_file("bucket/slow", bytes(200_000))
    proxy.latency_s, proxy.bytes_per_s = (0.2, 0.3), 500_000
    begin = time.monotonic()
    assert len(fs.cat_file("bucket/slow")) == 200_000
    assert time.monotonic() - begin > 0.5


def test_data_survive_a_kill(server: servers.S3Server) -> None:
    client(server.port).pipe_file("bucket/kept", b"data")
    server.kill()
    with pytest.raises(Exception):  # noqa: B017
        client(server.port).cat_file("bucket/kept")
    server.start()
    assert client(server.port).cat_file("bucket/kept") == b"data"


def test_a_paused_server_answers_later(server: servers.S3Server) -> None:
    fs = client(server.port)
    fs.pipe_file("bucket/w", b"data")
    fs.retries = 1
    server.pause()
    try:
        with pytest.raises(Exception):  # noqa: B017
            fs.cat_file("bucket/w")
    finally:
        server.resume()
    assert fs.cat_file("bucket/w") == b"data"
