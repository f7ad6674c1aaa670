"""Addresses as people write them, and as sockets and URLs want them."""

import errno
import os
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

BACKLOG = 1024  # connections that wait to be accepted
ENGINE_API = "/v1"  # below which an engine has OpenAI's API: clients are told it with the URL, a node is not


def engine_base(url: str) -> str:
    """An engine's URL without what clients of OpenAI's API have at its end: slashes and `/v1`."""
    return url.rstrip("/").removesuffix(ENGINE_API).rstrip("/")


def same_place(url: str) -> str:
    """The same text for URLs that lead to one program: `localhost` and its addresses, a port that is given or is the
    scheme's own, another spelling of an address or a name. Two names that mean one address are not known for that."""
    parts = urlsplit(engine_base(url))
    host = (parts.hostname or "").rstrip(".")
    address = _address(host)
    if is_unspecified(host) or host in ("localhost", "127.0.0.1", "::1"):
        host = "localhost"
    elif address is not None:
        host = str(address)
    return netloc(host, parts.port or (443 if parts.scheme == "https" else 80)) + parts.path


def netloc(host: str, port: int) -> str:
    """Host and port as a URL has them, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(url: str) -> str:
    """The host in a URL, of an IPv6 address without brackets; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_unspecified(host: str) -> bool:
    """Whether it says "every address of this machine" to who listens, and nothing to who calls: 0.0.0.0 and ::."""
    address = _address(host)
    return address is not None and address.is_unspecified


def is_loopback(host: str) -> bool:
    """Whether it is this machine, for itself alone."""
    address = _address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback


def _address(host: str) -> IPv4Address | IPv6Address | None:
    """An address, of one of IPv4 that is written as one of IPv6 the former; None for a name."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


def here(host: str) -> str:
    """The host at which a program on this machine reaches what listens at `host`."""
    if not is_unspecified(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def listen(host: str, port: int, setting: str = "port") -> socket.socket:
    """A socket that listens; at `::` for IPv4 as well. Raises OSError, which names the address and what to do, in words
    of the configuration, where `setting` is the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dual = family == socket.AF_INET6 and is_unspecified(host) and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        at = netloc(host, port)
        if error.errno == errno.EADDRINUSE:
            said = f"{at} is in use by another program; end that, or choose another `{setting}`"
        elif error.errno == errno.EACCES:
            said = f"{at} may not be used by this user; choose a `{setting}` from 1024 on"
        elif error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            said = f"{at} is no address of this machine; `host` is where the node listens, `url` where peers reach it"
        elif error.errno is None or error.errno < 0:  # of getaddrinfo
            said = f"{host!r} is no host that can be found here"
        else:
            said = f"{at}: {os.strerror(error.errno)}"
        raise OSError(said) from None


def is_free(host: str, port: int) -> bool:
    """Whether a node could listen there now."""
    try:
        listen(host, port).close()
    except OSError:
        return False
    return True
