"""What units have written, from systemd's journal."""

from __future__ import annotations

import subprocess

from phalanx.child import MAX_LINE_BYTES

JOURNAL_SECONDS = 5.0


def read_journal(match: str, lines: int) -> list[str]:
    """The last *lines* that match (an option or a FIELD=value of journalctl(1)), oldest first. Blocks.

    Each is cut to ``MAX_LINE_BYTES``. Raises OSError, also when journalctl does not end in time.
    """
    command = ("journalctl", "--quiet", "--no-pager", "--output=cat", f"--lines={lines}", match)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=JOURNAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"journalctl did not end within {JOURNAL_SECONDS:g} s") from None
    if done.returncode != 0:
        raise OSError(f"journalctl: {done.stderr.decode(errors='replace').strip() or done.returncode}")
    return [line[:MAX_LINE_BYTES].decode(errors="replace") for line in done.stdout.splitlines()]
