"""The console: what a node, or a network on one machine, shows of itself in a browser, live."""
