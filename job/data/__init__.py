"""CIFAR-10: where its files come from, how they are verified and read, and the plan of an epoch.

Nothing here knows a network or a device.
"""
