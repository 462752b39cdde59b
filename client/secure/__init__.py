"""The client's half of a secure sum: it trusts the server to follow the protocol, and checks what it can.

Its secrets lie in its own folder for as long as their session goes on. ``docs/secure-aggregation.md`` has the protocol.
"""
