"""Serves the report of a run to a browser on this machine.

    diq view runs/mine [--port=8000]

A report of many rows keeps them in files beside the page, which a browser reads from a server only.
Any other static file server does as well.
"""

import functools
import http.server
import pathlib

from absl import flags

from diq_jax import errors

PORT = flags.DEFINE_integer("port", 8000, "Of this machine; 0 = a free one.", 0, 2**16 - 1)
ARGUMENTS = ("WORKDIR",)
PAGE = "report.html"


class ReportHandler(http.server.SimpleHTTPRequestHandler):
    """Answers with files of one folder, and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Drops the line that a request would print."""


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


def main(workdir: str) -> None:
    """Serves until Ctrl-C."""
    with open_server(workdir, PORT.value) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/{PAGE}"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
