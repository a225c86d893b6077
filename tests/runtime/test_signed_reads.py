"""Reads by signed URLs from a real S3 server: used once a file is known, and never in the way of the client."""

import contextlib
import functools
import http.server
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.errors import StorageError
from pretrain.runtime import signed_reads, storage
from pretrain.runtime.signed_reads import SignedReads
from tests.faults import servers
from tests.faults.proxy import DENIED, FaultProxy

CONTENT = bytes(range(256)) * 8000
URL = "s3://bucket/folder/a file.tar"
SIGNED = "X-Amz-Signature"


@pytest.fixture
def proxy(server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before a server that holds CONTENT at URL; nothing is known of the file yet."""
    one = FaultProxy(server.port)
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = servers.settings(one.port, timeout_s=1)
    monkeypatch.setattr(storage, "SIGNED", SignedReads())
    storage.write_bytes(URL, CONTENT)
    one.log.clear()
    yield one
    one.close()
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)


class Signs:
    """A file system that gives out one URL for all files."""

    protocol, storage_args, storage_options = "s3", (), dict[str, str]()
    config_kwargs, connect_timeout, read_timeout = dict[str, float](), 5, 15

    def __init__(self, url: str) -> None:
        self._url = url

    def sign(self, path: str, expiration: int, timeout: float) -> str:
        return self._url


def signed(proxy: FaultProxy) -> int:
    return sum(SIGNED in line for line in proxy.log)


def read_some(deadline_s: float = 20) -> None:
    assert storage.read_bytes(URL, 1000, 1_500_000, deadline_s) == CONTENT[1000:1_500_000]


def test_a_file_that_is_known_is_read_by_signed_urls_only(proxy: FaultProxy) -> None:
    read_some()
    assert signed(proxy) == 0
    known = len(proxy.log)
    for start in range(0, 50, 10):
        assert storage.read_bytes(URL, start, start + 3) == CONTENT[start : start + 3]
    assert signed(proxy) == 5 == len(proxy.log) - known


def test_whole_files_are_read_by_the_client(proxy: FaultProxy) -> None:
    read_some()
    assert storage.read_bytes(URL) == CONTENT
    assert signed(proxy) == 0


@pytest.mark.parametrize("fault", ["denies", "refuses", "cut", "throttled"])
def test_what_fails_is_read_by_the_client(proxy: FaultProxy, fault: str) -> None:
    read_some()
    read_some()
    proxy.only = SIGNED
    setattr(proxy, fault, 1.0 if fault in ("cut", "throttled") else True)
    read_some()
    assert signed(proxy) == 2 and sum(proxy.seen[name] for name in ("denied", "refused", "cut", "throttled")) == 1
    proxy.clear()
    read_some()
    assert signed(proxy) == 3, "signed anew by the client's read, and used again"


def test_an_outage_does_not_end_signed_reads_for_good(proxy: FaultProxy) -> None:
    read_some()
    read_some()
    proxy.only, proxy.denies = SIGNED, True
    for _ in range(2):
        for _ in range(signed_reads.STRIKES - 1):
            read_some()
        proxy.denies = False
        known = signed(proxy)
        read_some()
        assert signed(proxy) == known + 1
        proxy.denies = True


def test_an_error_as_long_as_the_range_is_no_data(proxy: FaultProxy) -> None:
    read_some()
    proxy.only, proxy.denies = SIGNED, True
    end = 10 + len(DENIED[1])
    assert storage.read_bytes(URL, 10, end) == CONTENT[10:end]
    assert proxy.seen["denied"] == 1


def test_a_server_that_knows_no_ranges_is_not_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{plain.server_port}/file"
        signs = Signs(url)
        known: Any = SignedReads()
        known.client_has_read(signs, "bucket/file")
        assert known.read(signs, "bucket/file", 0, len(CONTENT), 5) == CONTENT
        assert known.read(signs, "bucket/file", 0, 10, 5) is None
        plain.shutdown()


@pytest.mark.parametrize(("timeout_s", "most"), [(1, 2.5), (20, 5.5)], ids=["the client's timeout", "half of deadline"])
def test_a_hanging_server_is_waited_for(proxy: FaultProxy, timeout_s: float, most: float) -> None:
    fsspec.config.conf["s3"] = servers.settings(proxy.port, timeout_s)
    read_some()
    proxy.only, proxy.hangs = SIGNED, True
    begun = time.monotonic()
    read_some(deadline_s=6)
    assert min(timeout_s, 3) <= time.monotonic() - begun < most
    proxy.hangs = False


def test_a_slow_answer_is_given_up_in_mid_answer(proxy: FaultProxy) -> None:
    read_some()
    proxy.only, proxy.bytes_per_s = SIGNED, 500_000
    begun = time.monotonic()
    with pytest.raises(StorageError):
        storage.read_bytes(URL, 0, 2_000_000, 2)
    assert time.monotonic() - begun < 4 and signed(proxy) == 1


def test_a_bucket_that_can_only_be_read_by_the_client_is_left_to_it(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.only, proxy.denies = SIGNED, True
    with caplog.at_level(logging.WARNING):
        for _ in range(signed_reads.STRIKES + 5):
            read_some()
    assert signed(proxy) == signed_reads.STRIKES
    (line,) = [record.message for record in caplog.records if "signed" in record.message]
    assert "bucket bucket can't be read by signed URLs (ConnectionError)" in line
    assert SIGNED not in caplog.text, "a signed URL is as good as the credentials"


def test_an_expired_url_is_signed_anew(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed_reads, "EXPIRES_S", signed_reads.EARLY_S + 1)
    read_some()
    read_some()
    read_some()
    time.sleep(1.1)
    read_some()
    urls = [line for line in proxy.log if SIGNED in line]
    assert len(urls) == 3 and urls[0] == urls[1] != urls[2]


def test_proxies_of_the_environment_are_the_clients_business(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    read_some()
    read_some()
    assert signed(proxy) == 0


def test_old_urls_make_room(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed_reads, "FILES", 2)
    read_some()
    for name in "abca":
        storage.write_bytes(f"s3://bucket/{name}", CONTENT)
        assert storage.read_bytes(f"s3://bucket/{name}", 5, 10) == CONTENT[5:10]
    assert signed(proxy) == 4
    assert [path for _, path in storage.SIGNED._urls] == ["bucket/c", "bucket/a"]


def test_other_files_of_a_bucket_are_signed_at_once(proxy: FaultProxy) -> None:
    storage.write_bytes("s3://bucket/other", CONTENT)
    read_some()
    before = len(proxy.log)
    assert storage.read_bytes("s3://bucket/other", 5, 10) == CONTENT[5:10]
    assert len(proxy.log) == before + 1 == before + signed(proxy)


def test_settings_that_differ_share_nothing(proxy: FaultProxy, server: servers.S3Server) -> None:
    read_some()
    read_some()
    fsspec.config.conf["s3"] = servers.settings(server.port, timeout_s=1)
    read_some()
    assert signed(proxy) == 1, "URLs of one endpoint are not used for another"


def test_a_url_that_no_longer_works_is_signed_anew(proxy: FaultProxy) -> None:
    """Keys are rotated before a URL expires."""
    read_some()
    read_some()
    ((file, (url, until)),) = storage.SIGNED._urls.items()
    storage.SIGNED._urls[file] = url[:-3] + "000", until
    read_some()
    read_some()
    first, wrong, again = [line for line in proxy.log if SIGNED in line]
    assert wrong.endswith("000") and not again.endswith("000") and not first.endswith("000")


def test_local_files_are_not_signed(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(CONTENT)
    known: Any = SignedReads()
    known.client_has_read(fsspec.filesystem("file"), str(file))
    assert known.read(fsspec.filesystem("file"), str(file), 0, 10, 5) is None


def test_an_answer_that_drips_is_given_up() -> None:
    """A few bytes a second keep every timeout between two pieces from being reached."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        SignedReads()._get(f"http://127.0.0.1:{listener.getsockname()[1]}/a", 0, 100_000, begin + 1, 5.0, 5.0)
    assert 0.9 < time.monotonic() - begin < 5
    listener.close()
