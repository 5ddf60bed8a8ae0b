"""Alerts that reach people: by a command, or as a message to a webhook."""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from conf.registry import register
from train.metrics.base import Run, Sink, Value


@register("logger", "alert", package="logger.alert")
@dataclass(frozen=True)
class Alert:
    """Run a command, or post to a webhook, when a step spikes, steps stall, a gate fails, a fault or a straggler is
    found. One that fails is named, and the next alert tries again.

    Args:
        command: run with the kind and the text as two further arguments, for instance "mail-me"; empty for none.
        webhook_env: environment variable with the address that `{"text": ..., "run": ..., "kind": ...}` is posted to,
            as Slack, Mattermost and others take it. The address is a secret, and so never part of the configuration.
        every_s: least seconds between two alerts of one kind; those in between are counted.
        timeout_s: seconds that the command or the webhook may take.
    """

    command: str = ""
    webhook_env: str = "LONGRUN_WEBHOOK"
    every_s: float = 60.0
    timeout_s: float = 10.0
    apart: ClassVar[bool] = True

    def open(self, run: Run) -> Sink:
        """Raises:
        ValueError: there is nobody to tell.
        """
        if not self.command and not os.environ.get(self.webhook_env):
            raise ValueError(f"set logger.alert.command, or the environment variable {self.webhook_env}")
        return _Caller(self, run)


class _Caller:
    def __init__(self, option: Alert, run: Run):
        self._option, self._run = option, run
        self._last: dict[str, float] = {}
        self._between: dict[str, int] = {}

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        pass

    def alert(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if now - self._last.get(kind, -self._option.every_s) < self._option.every_s:
            self._between[kind] = self._between.get(kind, 0) + 1
            return
        self._last[kind] = now
        if missed := self._between.pop(kind, 0):
            text += f" ({missed} more of this kind since the last alert)"
        said = f"{self._run.name} on {socket.gethostname()}: {kind}: {text}"
        for way in (self._call, self._post):
            try:
                way(kind, said)
            except (OSError, ValueError, subprocess.SubprocessError) as error:  # those of requests are OSErrors
                print(f"an alert was not delivered: {type(error).__name__} {_why(error)}", file=sys.stderr, flush=True)

    def _call(self, kind: str, said: str) -> None:
        if self._option.command:
            command = [*shlex.split(self._option.command), kind, said]
            quiet = subprocess.DEVNULL  # what it complains of goes where the run's own complaints go
            subprocess.run(command, stdin=quiet, stdout=quiet, timeout=self._option.timeout_s, check=True)

    def _post(self, kind: str, said: str) -> None:
        import requests

        if address := os.environ.get(self._option.webhook_env):
            content = {"text": said, "run": self._run.name, "kind": kind}
            requests.post(address, json=content, timeout=self._option.timeout_s).raise_for_status()

    def close(self, summary: Mapping[str, Value]) -> None:
        pass


def _why(error: Exception) -> str:
    """Without the webhook's address, which errors of `requests` quote."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"took more than {error.timeout:.1f} s"
    answer = getattr(error, "response", None)
    return f"HTTP {answer.status_code}" if answer is not None else str(getattr(error, "strerror", None) or "")
