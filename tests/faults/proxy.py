"""Faults of networks and servers, injected between a client and a real server on loopback.

One thread a connection, one request a connection (`Connection: close` is added, which no signature covers), so that a
fault belongs to a request. What a fault hits is drawn with a seed; change the attributes while the proxy runs.
"""

import contextlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter

#: Answers of a store that does not want to: status line and body.
THROTTLED = ("503 Slow Down", "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")
DENIED = ("403 Forbidden", "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
MISSING = ("404 Not Found", "<Error><Code>NoSuchKey</Code><Message>The key does not exist.</Message></Error>")

#: An answer's part of more bytes has its head, if any, in its first half.
BODY_FROM = 1200


class FaultProxy:
    """Passes HTTP on to a server, with faults.

    Args:
        server_port: Port of the server on loopback.
        port: Port of the proxy; 0: any free one.
        seed: Draws which requests are hit.

    Attributes:
        latency_s: Bounds of the waiting time that is added to every request, seconds.
        throttled: Share of requests that get 503 SlowDown instead of an answer.
        cut: Share of requests whose connection is reset in mid-answer.
        cut_after: Bytes of the answer (head included) that come before that reset.
        hangs: While True, requests get no answer at all; they get one when it is False again.
        denies: While True, requests get 403 AccessDenied.
        refuses: While True, every connection is reset at once, as if no server were there.
        missing: While True, requests get 404 NoSuchKey.
        flips: Share of requests in whose answer one bit is another.
        bytes_per_s: Most bytes a second of each direction of a connection; 0: as fast as it goes.
        only: Regular expression for "METHOD /path?query"; others pass unharmed.
        seen: How often each fault struck; "requests" counts all.
        log: "METHOD /path?query" of all requests, in the order of their coming.
    """

    def __init__(self, server_port: int, port: int = 0, seed: int = 0) -> None:
        self._server_port = server_port
        self._random = random.Random(seed)
        self.clear()
        self.seen: Counter[str] = Counter()
        self.log: list[str] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    def clear(self) -> None:
        """No faults any more."""
        self.latency_s = (0.0, 0.0)
        self.throttled = self.cut = 0.0
        self.cut_after = 1000
        self.flips = 0.0
        self.hangs = self.denies = self.refuses = self.missing = False
        self.bytes_per_s = 0
        self.only = ""

    def close(self) -> None:
        """Accept nothing any more; connections that are open end by themselves."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="proxied").start()

    def _serve(self, client: socket.socket) -> None:
        # A peer that went away is what this is all about, on either side.
        with client, contextlib.suppress(OSError):
            client.settimeout(600)
            head, rest = _read_head(client)
            if head:
                self._request(client, head, rest)

    def _request(self, client: socket.socket, head: bytes, rest: bytes) -> None:
        what = " ".join(head.split(b"\r\n", 1)[0].decode(errors="replace").split(" ")[:2])
        self.seen["requests"] += 1
        self.log.append(what)
        hit = re.search(self.only, what) is not None
        if hit:
            time.sleep(self._random.uniform(*self.latency_s))
        while hit and self.hangs and not self._closed:
            self.seen["hung"] += 1
            time.sleep(0.05)
        if hit and self.refuses:
            self.seen["refused"] += 1
            _reset(client)
        elif hit and self._random.random() < self.throttled:
            self.seen["throttled"] += 1
            _answer(client, head, rest, *THROTTLED)
        elif hit and self.denies:
            self.seen["denied"] += 1
            _answer(client, head, rest, *DENIED)
        elif hit and self.missing:
            self.seen["missing"] += 1
            _answer(client, head, rest, *MISSING)
        else:
            cut = hit and self._random.random() < self.cut
            self.seen["cut"] += cut
            flip = hit and self._random.random() < self.flips
            self._pass_on(client, head, rest, self.cut_after if cut else None, flip)

    def _pass_on(self, client: socket.socket, head: bytes, rest: bytes, limit: int | None, flip: bool) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), timeout=600)
        except OSError:
            _reset(client)
            return
        with server:
            server.sendall(re.sub(rb"\r\nConnection:[^\r]*", b"", head, flags=re.I)[:-2])
            server.sendall(b"Connection: close\r\n\r\n" + rest)
            threading.Thread(target=self._copy, args=(client, server), daemon=True, name="upwards").start()
            if not self._copy(server, client, limit, flip):
                _reset(client)

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None = None, flip: bool = False) -> bool:
        """Copy to the end of the stream; False: `limit` bytes came before, or a side broke off."""
        copied = 0
        try:
            # A tenth of a second's worth at a time: bytes that drip, instead of a gush and a pause.
            while data := source.recv(max(1, self.bytes_per_s // 10) if self.bytes_per_s else 1 << 16):
                if flip and len(data) > BODY_FROM:
                    # Not always the same bit: two answers with one fault would be believed.
                    data, flip = _flipped(data, self._random.randrange(len(data) // 2, len(data))), False
                    self.seen["flipped"] += 1
                kept = data if limit is None else data[: limit - copied]
                target.sendall(kept)
                copied += len(kept)
                if limit is not None and copied >= limit:
                    return False
                if self.bytes_per_s:
                    time.sleep(len(kept) / self.bytes_per_s)
        except OSError:
            return False
        return True


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """Head of a request, with the empty line, and what came of its body; nothing where the client closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(1 << 16)
        if not more:
            return b"", b""
        data += more
    end = data.index(b"\r\n\r\n") + 4
    return data[:end], data[end:]


def _flipped(data: bytes, at: int) -> bytes:
    """The bytes with one bit of the byte `at` changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _answer(client: socket.socket, head: bytes, rest: bytes, status: str, body: str) -> None:
    _drain(client, head, rest)
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/xml", "Connection: close")
    client.sendall("\r\n".join([*lines, "", "" if head.startswith(b"HEAD ") else body]).encode())


def _drain(client: socket.socket, head: bytes, rest: bytes) -> None:
    """Read a request's body: closing with unread bytes would reset the connection before the answer is read."""
    if re.search(rb"\r\nExpect:", head, flags=re.I):
        return
    found = re.search(rb"\r\nContent-Length:\s*(\d+)", head, flags=re.I)
    left = int(found[1]) - len(rest) if found else 0
    while left > 0 and (data := client.recv(min(left, 1 << 16))):
        left -= len(data)


def _reset(client: socket.socket) -> None:
    """Close with RST, as a dying host or a middle box does."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RD)  # a thread that waits in recv would keep the connection open, unanswered
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
