"""HTTP: routes, replies, connections, message authentication, keys."""
