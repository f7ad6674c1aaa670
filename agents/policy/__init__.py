"""The learned policy: its architecture, the network in torch, the same function without torch, and its files."""
