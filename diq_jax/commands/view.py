"""Serves the report of a run to a browser on this machine, or two runs against each other.

    diq view runs/mine [--port=8000]
    diq view runs/a runs/b

A report of many rows keeps them in files beside the page, which a browser reads from a server only.
Any other static file server does as well. Of two runs over one pool the page is made anew, in a
folder that goes when the server ends: `diq report --compare` keeps it.
"""

import pathlib
import tempfile

from absl import flags

from diq_jax.commands import cli
from diq_jax.report import server

VERIFY = cli.define_verify()
PORT = flags.DEFINE_integer("port", 8000, "Of this machine; 0 = a free one.", 0, 2**16 - 1)
ARGUMENTS = ("RUN", "[RUN]")


def main(workdir: str, other: str = "") -> None:
    """Serves until Ctrl-C."""
    runs = [cli.run_folder(run, "diq view") for run in (workdir, *filter(None, [other]))]
    with tempfile.TemporaryDirectory() as scratch:
        if other:
            from diq_jax.report import compare

            sides = compare.load(runs[0], runs[1], "diq view", cli.verify(VERIFY))
            compare.write(pathlib.Path(scratch), sides)
        with server.open_server(scratch if other else runs[0], PORT.value) as opened:
            address = f"http://127.0.0.1:{opened.server_address[1]}/{server.PAGE}"
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            opened.serve_forever()
