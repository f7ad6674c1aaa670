"""Where the `wwwserve` command starts: it takes seconds to import what it needs, in which Ctrl-C just ends it."""

import signal


def main() -> int:
    """See `serving.cli.main`."""
    kept = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from wwwserve.serving import cli

    signal.signal(signal.SIGINT, kept)
    return cli.main()
