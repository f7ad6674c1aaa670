"""The live node: a provider on a real engine, serving its users and its peers."""
