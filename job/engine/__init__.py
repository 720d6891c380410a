"""What computes: the devices, the group of workers, the compiled training step and prediction.

It computes steps and predictions; which epoch they belong to, and what is kept of them, `job.run` decides.
"""
