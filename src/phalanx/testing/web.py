"""A web server that says which node and epoch it runs for: the program of tests and benchmarks of addresses.

Run as a file (``python -I web.py PORT [SECONDS]``), with nothing but a few modules of the standard library,
so that it starts in some 20 ms. ``/``: ``<node> <epoch>``. ``/hold``: the same, and then a silent connection.
``/fill``: more than any client takes. SECONDS: it waits so long before it serves.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
_FILL_BYTES = 1 << 20


def _answer(connection: socket.socket, said: bytes) -> None:
    with connection, contextlib.suppress(OSError):
        request = connection.recv(4096)
        path = request.split(b" ", 2)[1] if request.count(b" ") >= 2 else b"/"
        if path == b"/fill":
            connection.sendall(_HEAD + b"\r\n")
            while True:
                connection.sendall(bytes(_FILL_BYTES))
        if path == b"/hold":
            connection.sendall(_HEAD + b"\r\n" + said)
            while connection.recv(4096):
                pass
            return
        connection.sendall(_HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(said), said))


def _end(number: int, frame: object) -> None:
    os._exit(0)


def main() -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, _end)
    if len(sys.argv) > 2:
        time.sleep(float(sys.argv[2]))
    said = f"{os.environ.get('PHALANX_NODE', '?')} {os.environ.get('PHALANX_EPOCH', '0')}".encode()
    with socket.socket(socket.AF_INET6) as listening:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("::", int(sys.argv[1])))
        listening.listen(128)
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=_answer, args=(connection, said), daemon=True).start()


if __name__ == "__main__":
    main()
