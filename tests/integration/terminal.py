"""A program at a pseudo-terminal: type into it, press Ctrl-C, wait for what it shows."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tests.processes import on_this_machine

# A session of its own whose controlling terminal is its stdin: so Ctrl-C is a SIGINT, as at a real terminal.
_TAKE_TERMINAL = (
    "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**env, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
        )
        os.close(inner)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end within a character
        self._read = 0

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str, within_s: float = 30.0) -> re.Match[str]:
        """The first match after the last one."""
        deadline = time.monotonic() + on_this_machine(within_s)
        while (found := re.compile(pattern).search(self.shown, self._read)) is None:
            self._take(deadline, f"{pattern!r}")
        self._read = found.end()
        return found

    def wait(self, within_s: float = 30.0) -> int:
        """Its exit status."""
        deadline = time.monotonic() + on_this_machine(within_s)
        with contextlib.suppress(EOFError):
            while True:
                self._take(deadline, "its end")
        return self.process.wait(within_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def _take(self, deadline: float, what: str) -> None:
        rest = deadline - time.monotonic()
        assert rest > 0, f"waited in vain for {what}; it shows:\n{self.shown}"
        if not select.select([self._fd], [], [], min(rest, 1.0))[0]:
            return
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux: EIO once the other side is closed
            data = b""
        if not data:
            if what == "its end":
                raise EOFError
            raise AssertionError(f"it ended while waiting for {what}; it showed:\n{self.shown}")
        self.shown += self._decoder.decode(data)


@contextlib.contextmanager
def terminal(*command: str, env: Mapping[str, str]) -> Iterator[Terminal]:
    one = Terminal(command, env)
    try:
        yield one
    finally:
        one.close()
