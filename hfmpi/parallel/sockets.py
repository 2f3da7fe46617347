"""TCP connections from every rank to rank 0, in addition to MPI; the kernel closes them when a rank dies."""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import time
from pathlib import Path

from hfmpi.parallel.communicator import Communicator

__all__ = ["link_up"]

_PATIENCE = 6.0  # seconds within which all ranks must connect to rank 0
_CONNECT, _ANSWER = 1.0, 3.0  # seconds for a connection to one address, and for the reply of rank 0


def link_up(comm: Communicator, near: bool) -> tuple[dict[int, socket.socket], list[int]]:
    """Connect all ranks to rank 0 by TCP, without raising network errors; collective.

    Parameters
    ----------
    comm : Communicator
        All its ranks call this.
    near : bool
        Whether this rank runs on rank 0's node.

    Returns
    -------
    links : dict
        Sockets by the rank at the other end: on rank 0 the sockets of all other ranks, on other ranks the
        socket of rank 0.
    missing : list of int
        Ranks that could not be connected, the same list on every rank.
    """
    server, offer = None, None
    if comm.rank == 0:
        with contextlib.suppress(OSError):
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=comm.size, dualstack_ipv6=both)
            # Connections are authenticated by random tokens that are distributed over MPI.
            tokens = secrets.token_hex(16), secrets.token_hex(16)
            # The host name comes last, because it needs a resolver.
            offer = [*_addresses(), comm.host], server.getsockname()[1], tokens
    offer = comm.agree(offer)
    links: dict[int, socket.socket] = {}
    if server is not None and offer is not None:
        with server:
            links = _accept(server, comm.size, offer[2])
    elif offer is not None:
        addresses, port, tokens = offer
        link = _reach(["127.0.0.1"] * near + addresses, port, tokens, comm.rank)
        links = {} if link is None else {0: link}
    missing = comm.agree([rank for rank in range(1, comm.size) if rank not in links])
    if comm.rank in missing and links:
        links.pop(0).close()
    for link in links.values():
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return links, missing


def _addresses() -> list[str]:
    """Return this node's IPv4 addresses, without those of the loopback device."""
    with contextlib.suppress(OSError):
        table = Path("/proc/net/fib_trie").read_text()
        local = re.findall(r"\|-- (\S+)\s+/32 host LOCAL", table)
        return [address for address in dict.fromkeys(local) if not address.startswith("127.")]
    return []


def _accept(server: socket.socket, size: int, tokens: tuple[str, str]) -> dict[int, socket.socket]:
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _PATIENCE
    while len(links) < size - 1 and (remaining := deadline - time.monotonic()) > 0:
        server.settimeout(remaining)
        with contextlib.suppress(OSError, ValueError):
            link, _ = server.accept()
            link.settimeout(_CONNECT)
            token, _, rank = link.recv(64).partition(b" ")
            if secrets.compare_digest(token, tokens[0].encode()) and 0 < int(rank) < size:
                link.sendall(tokens[1].encode())
                links[int(rank)] = link
            else:
                link.close()
    return links


def _reach(addresses: list[str], port: int, tokens: tuple[str, str], rank: int) -> socket.socket | None:
    deadline = time.monotonic() + _PATIENCE - 1
    for address in addresses:
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(OSError):
            link = socket.create_connection((address, port), timeout=_CONNECT)
            link.settimeout(_ANSWER)
            link.sendall(f"{tokens[0]} {rank}".encode())
            # Read only the token, because rank 0 may have sent messages for the watchdog after it.
            if _receive(link, len(tokens[1])) == tokens[1].encode():
                return link
            link.close()
    return None


def _receive(link: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count and (part := link.recv(count - len(content))):
        content += part
    return content
