"""The server: a socket of our own, HTTP by uvicorn, and an end in good order."""

import asyncio
import errno
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from probe.errors import ConfigError
from probe.serving.service import Service

_POLL_SECONDS = 0.05  # between two looks whether to stop
_DRAIN_SECONDS = 60  # that requests under way have, once asked to stop; each has its own shorter limits


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address; it takes no connection before the server runs.

    Args:
      port: 0 for any that is free.
    Raises: ConfigError if the address is not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that has just ended
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use: give another --port, or --port 0 for any") from err
        if err.errno == errno.EACCES:
            raise ConfigError(f"port {port} is not for you: give a --port above 1023") from err
        raise ConfigError(f"--host {host}: {err.strerror}: give an address of this machine") from err
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


async def run_server(
    app: ASGIApp,
    service: Service,
    bound: socket.socket,
    *,
    should_stop: Callable[[], bool],
    on_ready: Callable[[], None],
) -> None:
    """Answers until it should stop, and then what is under way.

    Args:
      should_stop: asked twenty times a second. on_ready: called when connections are taken.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )
    server = uvicorn.Server(config)
    async with service.running():
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not (server.started or serving.done()):
            await asyncio.sleep(_POLL_SECONDS / 10)
        if server.started:
            on_ready()
        while not serving.done():
            server.should_exit = server.should_exit or should_stop()
            await asyncio.wait([serving], timeout=_POLL_SECONDS)
        await serving
