"""Errors of the system and of libraries, in words for people."""

import errno
import os
import re
import socket
import ssl

_WORDS = {
    errno.EMFILE: "too many files are open here",
    errno.ENFILE: "too many files are open on this machine",
    errno.ECONNREFUSED: "nothing listens there",
    errno.ECONNRESET: "the connection was broken off",
    errno.EPIPE: "the connection was broken off",
    errno.ETIMEDOUT: "no answer in time",
    errno.EHOSTUNREACH: "the machine cannot be reached",
    errno.ENETUNREACH: "its network cannot be reached",
}
_TECHNICAL = re.compile(r"\[Errno -?\d+\] ?| ?\(_ssl\.c:\d+\)")


def in_words(error: BaseException) -> str:
    """What went wrong, without numbers and names of the system's own."""
    reason = getattr(error, "os_error", None) or getattr(error, "reason", None)  # of aiohttp's errors, and urllib's
    if isinstance(reason, BaseException):
        return in_words(reason)
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno is not None:
        said = _WORDS.get(error.errno) or os.strerror(error.errno)
        return f"{error.filename}: {said}" if error.filename is not None else said
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]}"
    return _TECHNICAL.sub("", str(error)) or type(error).__name__
