"""Runs side by side: summaries, pairs, the table and the figures of ``compare``.

No TensorFlow is imported here, and no run is changed.
"""
