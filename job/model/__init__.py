"""The networks by the Keras functional API, their own layers and optimizer, and the ``.keras`` file.

Nothing here trains, and only batch normalization knows that there may be several replicas.
"""
