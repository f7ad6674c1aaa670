"""Setting a node up: its first files, cards that peers exchange, and what may be wrong."""
