"""What lies on each replica's device."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from job.engine.device_split import DeviceSplit, images_at
from tests.support import cluster_of, split_of


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_each_replica_has_all_images_and_labels_in_a_type_that_tensorflow_keeps_on_gpus(
    replicas: int,
) -> None:
    """What is int32 it keeps on the host, so that each step would copy all images to the GPU."""
    split, strategy = split_of(12), cluster_of(replicas).strategy
    on_devices = DeviceSplit(split, strategy)
    copies = strategy.experimental_local_results(on_devices.words)
    labels = strategy.experimental_local_results(on_devices.labels)
    assert len(copies) == len(labels) == replicas
    assert {copy.dtype for copy in (*copies, *labels)} == {tf.int64}
    assert len({copy.device for copy in copies}) == replicas
    for copy, classes in zip(copies, labels, strict=True):
        assert np.array_equal(images_at(copy, tf.constant([11, 0, 3])), split.images[[11, 0, 3]])
        assert np.array_equal(classes, split.labels)
