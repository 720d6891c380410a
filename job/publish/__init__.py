"""What people read of one run, made from its record: TensorBoard events, pictures, result files.

Nothing here decides anything about a run.
"""
