"""The simulated market: engines, traffic and scenarios in which providers are trained and compared."""
