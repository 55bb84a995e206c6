"""A server of a run's report, on the loopback address (`diq view`)."""

import contextlib
import functools
import http.server
import pathlib

from diq_jax import errors

PAGE = "report.html"


class ReportHandler(http.server.SimpleHTTPRequestHandler):
    """Answers with files of one folder, and logs nothing."""

    protocol_version = "HTTP/1.1"  # one connection for many files

    def log_message(self, format: str, *args: object) -> None:
        """Drops the line that a request would print."""

    def handle(self) -> None:
        """Answers until the browser goes away, which is no error."""
        with contextlib.suppress(ConnectionError):
            super().handle()


def open_server(workdir: str, port: int) -> http.server.ThreadingHTTPServer:
    """Opens a server of a run's report folder on the loopback address.

    Raises:
        UserError: the run has no report yet, or the port is taken.
    """
    folder = pathlib.Path(workdir)
    folder = folder if (folder / PAGE).is_file() else folder / "report"
    if not (folder / PAGE).is_file():
        raise errors.UserError(f"{workdir} has no report: make it with diq run --stages=report.")
    handler = functools.partial(ReportHandler, directory=str(folder))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise errors.UserError(f"--port={port}: {error.strerror}; choose another.") from error
