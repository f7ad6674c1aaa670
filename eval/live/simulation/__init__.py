"""Real nodes in one process, on a virtual clock and an in-memory network: a seed is a whole history.

`loop` moves time, `network` carries requests between ASGI applications and loses what it is told to lose, `disk` keeps
what outlives a crash, `engine` answers as an engine would, on the same clock.
"""
