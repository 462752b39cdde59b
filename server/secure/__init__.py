"""The server's half of a secure sum: it carries keys and sealed shares, adds masked uploads and lifts the sum's masks.

``docs/secure-aggregation.md`` has the protocol.
"""
