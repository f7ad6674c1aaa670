"""Learning a provider's policy in the simulated market."""
