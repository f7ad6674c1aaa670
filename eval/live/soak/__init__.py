"""Real processes under load and faults: nodes with TLS, ledgers and duels, one of them malicious."""
