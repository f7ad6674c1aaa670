"""File descriptors: how many this process may have open, and for how many connections they are enough.

Where there are too few, a node takes fewer connections rather than meet the end of them in the middle of a request.
"""

import errno
import resource

import msgspec

from wwwserve.serving.config import SPARE_FILES, ConfigError, NodeConfig

LEAST_CONNECTIONS = 8  # with which a node is of use


def raise_limit(needed: int) -> int:
    """Have this process open as many files as the system lets it; returns how many. Where that has no end, as many as
    are `needed`."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(files, needed) if most in (resource.RLIM_INFINITY, -1) else most
    if 0 <= files < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return most_files()


def most_files() -> int:
    """How many this process may have open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files if files >= 0 else 1 << 62


def fitting(config: NodeConfig) -> NodeConfig:
    """The configuration with as many connections as there are files for. Raises ConfigError where that is none to speak
    of."""
    most = most_files()
    missing = config.files - most
    if missing <= 0:
        return config
    connections = config.limits.connections - -(-missing // 2)  # each may have another one behind it
    if connections < LEAST_CONNECTIONS:
        least = config.files - 2 * (config.limits.connections - LEAST_CONNECTIONS)
        raise ConfigError(f"at most {most} files can be open at once here (ulimit -n), expected at least {least}")
    limits = msgspec.structs.replace(config.limits, connections=connections)
    return msgspec.structs.replace(config, limits=limits)


def are_short(number: int) -> bool:
    """Whether few files can be opened yet, as the one opened last has this number: a new one has the lowest that is
    free."""
    return number >= most_files() - SPARE_FILES // 2


def is_shortage(error: BaseException) -> bool:
    """Whether something failed for lack of files that can be opened here, and not for who was asked."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
