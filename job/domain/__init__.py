"""What a run is, as plain values; also the exit codes, errors of the disk, and cleaning up.

Standard library only; nothing above it is imported.
"""
