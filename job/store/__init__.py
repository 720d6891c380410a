"""Where objects live: one contract, a folder and a bucket that keep it.

Nothing here knows what the objects mean.
"""
