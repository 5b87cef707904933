"""Lightning data modules for image classification, with augmentation for whole batches on the device."""

from normzoo.data.cifar10 import CIFAR10
from normzoo.data.fashion_mnist import FashionMNIST
from normzoo.data.image_folder import ImageFolder

__all__ = ["CIFAR10", "FashionMNIST", "ImageFolder"]
