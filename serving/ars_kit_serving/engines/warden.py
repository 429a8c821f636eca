"""A process that keeps another: both end when whoever started them does, whatever ended it.

Run as ``python warden.py SECONDS COMMAND...`` in a process group of its own. Its standard input is
a pipe that the starter holds open; when that closes the command is told to stop, and after SECONDS
it is killed with all that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Keep the command until one of the two has ended."""
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 -- the starter's

    def watch() -> None:
        sys.stdin.buffer.read()
        child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    sys.stderr.write(f"ended with exit code {code}\n")
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)  # what it left behind, and this


if __name__ == "__main__":
    main()
