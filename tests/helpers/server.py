"""JupyterLab as a process: started by whatever command, waited for until it answers, stopped with all its kernels."""

import http.client
import json
import socket
import subprocess
import time
from contextlib import contextmanager, suppress

import psutil


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Server:
    """A running JupyterLab whose token is `secret`, and a way to ask it.

    Attributes:
        seconds: how long it took from the command to its first answer.
    """

    def __init__(self, command, log, port, base="/", seconds=120, **options):
        self.log, self.port, self.base, self.address = log, port, base, f"http://127.0.0.1:{port}{base}"
        begin = time.perf_counter()
        with log.open("wb") as out:
            self.process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)
        try:
            while not self.answers():
                assert self.process.poll() is None, self.said()
                assert time.perf_counter() - begin < seconds, self.said()
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise
        self.seconds = time.perf_counter() - begin

    def answers(self):
        """Return whether it answers yet."""
        with suppress(ConnectionError):
            return self.ask("GET", "api").status == 200
        return False

    def said(self):
        """What it printed so far."""
        return self.log.read_text("utf-8")

    def ask(self, method, path, body=None):
        """Send a request to a path below the base; return the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": "token secret"}
        connection.request(method, self.base + path, json.dumps(body) if body else None, headers)
        return connection.getresponse()

    def family(self):
        """It and all that it started."""
        return [self.process, *self.process.children(recursive=True)]

    def stop(self, *signal):
        """Stop it as a person would; return the processes that it had and those of them that are left."""
        if self.process.poll() is not None:
            return [], []
        family = self.family()
        self.process.send_signal(*signal) if signal else self.process.terminate()
        _, left = psutil.wait_procs(family, timeout=60)
        for process in left:
            process.kill()
        return family, left


@contextmanager
def running(server, *signal):
    """Stop a server after a block, by a signal if one is named; nothing of it may be left."""
    try:
        yield server
        assert "Traceback" not in server.said()  # before the end: a kernel may complain of being stopped
    finally:
        _, left = server.stop(*signal)
    assert left == []
