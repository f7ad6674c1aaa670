"""The engine that a node stands before: adapters, calibration, a real vLLM on this machine."""
