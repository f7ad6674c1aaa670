"""The engines that a node stands before: adapters, several as one, calibration, a real vLLM on this machine."""
