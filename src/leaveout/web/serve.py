"""Answers on a port until it is stopped."""

from __future__ import annotations

import socket
import sys

import uvicorn

from leaveout.web.api import application
from leaveout.web.workbench import Workbench

CONNECTIONS = 500  # at once


def serve_page(bench: Workbench, host: str, port: int, token: str | None, device: str = "cpu") -> None:
    """Serves a workbench, and says on stderr where. Raises: OSError if the port is taken."""
    server = listening(bench, host, port, token, device)
    with _socket(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        print(f"leaveout: the page is at {address} (stop with Ctrl-C)", file=sys.stderr)
        server.run(sockets=[listener])


def listening(bench: Workbench, host: str, port: int, token: str | None, device: str = "cpu") -> uvicorn.Server:
    """The server of a workbench, not yet started."""
    config = uvicorn.Config(
        application(bench, token, device), host, port, log_level="warning", server_header=False,
        limit_concurrency=CONNECTIONS, timeout_keep_alive=30, timeout_graceful_shutdown=2,
    )  # fmt: skip
    return uvicorn.Server(config)


def _socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found
