"""A program of the user's that judges answers, for example by asking a language model.

It is started once. For each answer it reads one line of JSON, {"prompt", "answer", "targets"}, and writes one line:
true, false or a number from 0 (wrong) to 1 (right), as JSON.

Knows processes and lines. Knows nothing of models or records.
"""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

from sphere.errors import SphereError

SHOWN = 80  # characters of a line in an error


class Judge:
    """A judge's program; started at the first question.

    Args:
        command: the program with its arguments, as a shell splits them; no shell runs it.
        seconds: how long an answer is waited for.
    """

    def __init__(self, command: str, seconds: float) -> None:
        self.command, self.seconds = command, seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __call__(self, question: Mapping[str, Any]) -> float:
        """The verdict on one answer, from 0 to 1.

        Raises:
            SphereError: the program cannot be started, ends, says nothing in time, or what it says is no verdict.
        """
        process = self._process or self._start()
        asked = json.dumps(question, ensure_ascii=False)
        try:
            assert process.stdin is not None
            process.stdin.write(asked + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._ended(asked) from error
        try:
            line = self._lines.get(timeout=self.seconds)
        except queue.Empty:
            self.close()
            raise _refused(
                f"The judge '{self.command}' said nothing within {self.seconds:g} s to {asked:.{SHOWN}}: it must write "
                "one line for each that it reads, and flush it; or let it take longer.",
                "judge_seconds",
            ) from None
        if line is None:
            raise self._ended(asked)
        return self._verdict(line)

    def close(self) -> None:
        """End the program."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            try:
                if stream:
                    stream.close()
            except OSError:  # what it has not read is lost, and nobody waits for it
                pass

    def _start(self) -> subprocess.Popen[str]:
        try:
            words = shlex.split(self.command)
            if not words:
                raise ValueError("it is empty")
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1
            )
        except (OSError, ValueError) as error:
            raise _refused(f"The judge '{self.command}' cannot be started: {error}.") from error
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        return self._process

    def _ended(self, asked: str) -> SphereError:
        code = self._process.wait() if self._process else None
        self.close()
        return _refused(
            f"The judge '{self.command}' ended (exit code {code}) before it answered {asked:.{SHOWN}}: it must read to "
            "the end of its input."
        )

    def _verdict(self, line: str) -> float:
        try:
            verdict = json.loads(line)
        except ValueError:
            verdict = None
        if isinstance(verdict, bool | int | float) and 0 <= verdict <= 1:
            return float(verdict)
        self.close()
        raise _refused(
            f"The judge '{self.command}' said {line.strip()!r:.{SHOWN}}, which is no verdict: it must write true, "
            "false or a number from 0 to 1."
        )


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Put each line of a program into a queue; None at its end."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except (OSError, ValueError):  # closed meanwhile, or not UTF-8
        pass
    lines.put(None)


def _refused(sentence: str, argument: str = "judge") -> SphereError:
    return SphereError(sentence, argument=argument)
