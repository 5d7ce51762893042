"""A worker's sign of life: a small file, written anew each second by a thread of its own.

`SHEAF_HEARTBEATS` names the folder; without it there are none. A supervisor reads the files
(`training.supervisor`), and so do the probes of `launch/`. Nobody's clock matters: whoever
watches looks at whether a file changes. The thread goes on while the main thread compiles or waits
in a collective, which is how a worker that is held up by another differs from one that has stopped.

A file `stop` in the folder is the same as SIGTERM: save after this step, and end. A worker whose
folder has vanished belongs to an attempt that is over. It ends at once, without saving: another
may be writing the run by now.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.timeline import host_name

FOLDER = "SHEAF_HEARTBEATS"
SECONDS = "SHEAF_HEARTBEAT_SECONDS"
PROCESS = "SHEAF_PROCESS"
STOP = "stop"
"""The file in the folder that asks all workers to stop."""
ORPHANED = 75
"""Exit status of a worker whose supervisor has given it up (EX_TEMPFAIL of sysexits.h)."""
STACK_AFTER_SECONDS = 5.0
"""Time without progress after which a heartbeat tells where the main thread is."""

Facts = Mapping[str, Any]


class Heartbeat:
    """The thread of one worker; a context manager that does nothing without a folder."""

    def __init__(self, folder: Path | None, process: int = 0, seconds: float = 1.0) -> None:
        self.folder, self.seconds = folder, seconds
        self._path = folder / f"{process}.json" if folder else None
        self._about = {"process": process, "host": host_name(), "pid": os.getpid()}
        started = time.monotonic()
        self._facts: Callable[[], Facts] = lambda: {
            "phase": "start",
            "waited": time.monotonic() - started,
        }
        self._beats = 0
        self._asked = False
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @staticmethod
    def from_environment(process: int | None = None) -> Heartbeat:
        """The heartbeat that this process's environment asks for, if it does."""
        folder = os.environ.get(FOLDER)
        number = process if process is not None else int(os.environ.get(PROCESS, "0"))
        seconds = float(os.environ.get(SECONDS, "1"))
        return Heartbeat(Path(folder) if folder else None, number, seconds)

    def follow(self, facts: Callable[[], Facts]) -> None:
        """From now on tell what `facts` gives: step, phase, seconds waited, limit, span."""
        self._facts = facts

    def __enter__(self) -> Heartbeat:
        if self._path is not None:
            self._write()
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self.seconds):
            try:
                self._write()
                self._obey()
            except FileNotFoundError:
                print("heartbeat: this attempt is over; ending at once", file=sys.stderr)
                sys.stderr.flush()
                os._exit(ORPHANED)
            except OSError as error:  # a disk that is full for a while is no reason to end
                print(f"heartbeat: {error}", file=sys.stderr)

    def _obey(self) -> None:
        assert self.folder is not None
        if not self._asked and (self.folder / STOP).exists():
            self._asked = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _write(self) -> None:
        assert self._path is not None
        facts = dict(self._facts())
        self._beats += 1
        limit = facts.get("limit")
        row = self._about | {"beat": self._beats, "late": False, **facts}
        if limit is not None:
            row["late"] = facts["waited"] > limit
        if facts["waited"] > STACK_AFTER_SECONDS:
            row["stack"] = main_stack(self._main)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(row))
        os.replace(fresh, self._path)


def main_stack(thread: int | None) -> list[str]:
    """`file:line function` of a thread's calls, innermost last; at most the last 12."""
    frame = sys._current_frames().get(thread or 0)
    calls = traceback.extract_stack(frame)[-12:] if frame is not None else []
    return [f"{call.filename}:{call.lineno} {call.name}" for call in calls]
