"""Serves the report of a run to a browser on this machine.

    diq view runs/mine [--port=8000]

A report of many rows keeps them in files beside the page, which a browser reads from a server only.
Any other static file server does as well.
"""

from absl import flags

from diq_jax.report import server

PORT = flags.DEFINE_integer("port", 8000, "Of this machine; 0 = a free one.", 0, 2**16 - 1)
ARGUMENTS = ("WORKDIR",)


def main(workdir: str) -> None:
    """Serves until Ctrl-C."""
    with server.open_server(workdir, PORT.value) as opened:
        address = f"http://127.0.0.1:{opened.server_address[1]}/{server.PAGE}"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        opened.serve_forever()
