"""Pages over a store: a live run, finished ones, and what they have to say.

The way of the data: ``source`` looks at the store, ``queries`` ask it in SQL, ``findings`` work out what is to be said,
``charts`` how it is drawn, ``views`` put it on pages, ``app`` is the frame around them. Nothing here imports torch.
"""

LOGIN_VARIABLE = "LORAFLEET_DASHBOARD_LOGIN"
"""In the environment: not empty where readers must sign in, whatever becomes of the file that says so."""
