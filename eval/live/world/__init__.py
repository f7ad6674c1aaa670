"""Histories of an evil world: real nodes on virtual time, faults by the dozen, and peers who are out to win.

`engine` answers with text that shows whose request it was, `nodes` boots real dispatchers and ledgers on it, `faults`
and `adversaries` do harm, `invariants` says what they must not have reached, `history` plays one seed.
"""
