"""Pictures from the web: only from hosts that were named, and never from within one's own network.

A name is looked up once; all that it stands for must be public, and one of these addresses is
connected to, so that no second answer of the name's owner can lead elsewhere.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urlsplit

from llama_vision.errors import SettingError, printable, quote
from llama_vision.inputs.pictures import ImageError

PORTS = {"http": 80, "https": 443}
TUNNELS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16", "2001::/32")))
"""IPv6 addresses that stand for IPv4 ones, which may be private: NAT64, 6to4, Teredo."""


def fetch_picture(
    url: str, hosts: Collection[str], *, seconds: float = 10, most: int = 32_000_000
) -> bytes:
    """The bytes at an http or https URL.

    Args:
        hosts: that may be asked, by their exact names in lower case.
        seconds: for all of it, but for the look-up of the name.
        most: bytes that are taken.

    Raises:
        ImageError: the host is none of them, or not public; or it does not give the picture.
    """
    parts, until = _read_url(url, hosts), None
    try:
        addresses = _public_addresses(parts)
        until = time.monotonic() + seconds
        plain = _connect(addresses, until)
        with plain, _ended(plain, until), _secured(plain, parts) as connection:
            data = _get(connection, parts, most)
        if time.monotonic() < until:
            return data
        why = f"it took more than {seconds:g} seconds"
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = until is not None and time.monotonic() >= until
        why = f"it took more than {seconds:g} seconds" if late else printable(error, 200)
    raise ImageError(f"image {printable(url)} cannot be fetched: {why}")


def check_hosts(names: Iterable[str]) -> list[str]:
    """Names of hosts, in lower case; empty ones are passed over.

    Raises:
        SettingError: one is a URL, or has a port.
    """
    hosts = [name.strip().lower() for name in names if name.strip()]
    for host in hosts:
        if not re.fullmatch(r"[\w.-]+", host):
            raise SettingError(f"{quote(host)} is no host; expected a name such as example.org")
    return hosts


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and not of a private or special network."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in TUNNELS)


def _read_url(url: str, hosts: Collection[str]) -> SplitResult:
    expected = f"a data URI, or http(s) from {', '.join(hosts)}" if hosts else "a data URI"
    try:
        parts = urlsplit(url)
        usual = parts.scheme in PORTS and parts.port in (None, PORTS[parts.scheme])
        if usual and "@" not in parts.netloc and parts.hostname in hosts:
            return parts
    except ValueError:  # of a port, or brackets
        pass
    raise ImageError(f"image {printable(url)} is not taken from there; expected {expected}")


def _public_addresses(parts: SplitResult) -> list[tuple]:
    """Where a host is, as `socket.getaddrinfo` says it."""
    found = socket.getaddrinfo(parts.hostname, PORTS[parts.scheme], type=socket.SOCK_STREAM)
    for *_, place in found:
        if not is_public(place[0]):
            raise ValueError(f"{parts.hostname} is at {place[0]}, which is no public address")
    return found


def _connect(addresses: list[tuple], until: float) -> socket.socket:
    """To the first of them that answers."""
    problem: OSError = OSError("the host has no address")
    for family, kind, protocol, _, place in addresses:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(0.001, until - time.monotonic()))
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem


@contextmanager
def _ended(connection: socket.socket, until: float) -> Iterator[None]:
    """End a connection when its time is over, however slowly it gives byte after byte."""

    def end() -> None:
        with suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)

    with connection.dup() as handle:  # which stays when TLS takes over the other one
        timer = threading.Timer(max(0, until - time.monotonic()), end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _secured(connection: socket.socket, parts: SplitResult) -> socket.socket:
    if parts.scheme == "http":
        return connection
    context = ssl.create_default_context()
    return context.wrap_socket(connection, server_hostname=parts.hostname)


def _get(connection: socket.socket, parts: SplitResult, most: int) -> bytes:
    client = http.client.HTTPConnection(parts.hostname)
    client.sock = connection
    target = parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()
    client.request("GET", target, headers={"Accept": "image/*", "User-Agent": "llama-vision"})
    with client.getresponse() as response:
        if response.status != 200:
            raise ValueError(f"it answers {response.status}; redirects are not followed")
        data = response.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it is larger than {most} bytes")
        if response.length:
            raise ValueError("it is cut short")
        return data
