"""Runs that are killed, frozen, interrupted and starved of space, and what must be left of them."""
