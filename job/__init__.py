"""Containerized batch training job: ResNet and PlainNet on CIFAR-10."""

__version__ = "0.1.0"
