"""The program of the conformance suite: does what a ``Behaviour`` (JSON) says, with its folder as witness.

``python program.py FOLDER BEHAVIOUR``. It needs nothing but Python, so that it runs as a process, a unit or
in a container alike. Each word that it has come to is an empty file of the folder (``started``, ``ready``,
``bye``, ``daemon``), and the pids of its processes, as they see them, are ``program.pid`` and ``daemon.pid``.
"""

import json
import os
import signal
import sys
import threading
import time

FOLDER, BEHAVIOUR = sys.argv[1], json.loads(sys.argv[2])


def say(word: str, text: str = "") -> None:
    """Leave *word* in the folder: whole, or not at all."""
    path = os.path.join(FOLDER, word)
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def leave_a_daemon() -> None:
    """A child of nobody, in a session of its own, that holds our output."""
    if os.fork():
        os.wait()
        while not os.path.exists(os.path.join(FOLDER, "daemon")):
            time.sleep(0.005)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    say("daemon.pid", str(os.getpid()))
    say("daemon")
    time.sleep(600)
    os._exit(0)


def bye() -> None:
    """End as asked."""
    say("bye")
    os._exit(0)


def on_stop(*_: object) -> None:
    """The signal to stop: what a program needs for its end may be long, and it goes on meanwhile."""
    timer = threading.Timer(BEHAVIOUR["stop_seconds"], bye)
    timer.daemon = True
    timer.start()


def main() -> None:
    """The whole life of the program."""
    began = time.monotonic()
    ignores = BEHAVIOUR["stop_seconds"] is None
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores else on_stop)
    say("program.pid", str(os.getpid()))
    for line in BEHAVIOUR["lines"]:
        print(line, flush=True)
    if BEHAVIOUR["daemon"]:
        leave_a_daemon()
    say("started")
    events = [(BEHAVIOUR["ready_seconds"], "ready"), (BEHAVIOUR["ends_seconds"], "")]
    for seconds, word in sorted((seconds, word) for seconds, word in events if seconds is not None):
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        if not word:
            os._exit(BEHAVIOUR["exit_code"])
        say(word)
    while BEHAVIOUR["floods"]:
        os.write(1, b"y\n" * 30000)
    time.sleep(600)


if __name__ == "__main__":
    main()
