"""Folding normalization layers into the convolutions and linear layers beside them."""

from __future__ import annotations

from typing import Any

from torch import nn

from normzoo.convert._fold import fold
from normzoo.convert._report import FoldReport
from normzoo.convert._treat import Treat


def fold_norms(model: nn.Module, example: Any = None, *, treat: Treat | None = None) -> FoldReport:
    """Fold the normalization layers of a model into the layers beside them, in place, for faster inference.

    A norm that in evaluation is ``y = scale * x + shift`` for each channel, as batch norm and its kin, frozen ones and
    affine layers are, goes into the convolution, transposed convolution or linear layer before it::

        weight <- scale * weight;   bias <- scale * bias + shift

    or else into the one behind it, unless that pads with zeros, through which no shift can pass::

        bias <- bias + sum(weight * shift);   weight <- weight * scale

    In its place stands the activation that was part of it, or ``nn.Identity``. Which layers are scales and shifts is
    found by trying each, and which follow each other by running the model: a pair is folded only where the one's output
    is the other's input and used for nothing else, each is called once, and nobody else uses their parameters. Torch's
    convolutions and linear layers are known; layers of other classes with a weight and a bias, subclasses with a
    forward of their own among them, are tried: a copy has to compute scaled and shifted outputs from scaled and shifted
    weights. Between norm and neighbour may be pooling, padding and resizing through which the scale and shift pass, as
    positive scales do through max-pooling. All other layers stay as they are, and the report says why: norms of each
    sample (group, layer, instance), norms after which an activation comes before the next convolution and which have
    none before them, convolutions with parametrized or standardized weights, layers with forward hooks.

    Args:
        model: any module, in evaluation mode. A compiled one compiles anew.
        example: one input batch to run it with; a tuple is several arguments, a dict keyword arguments, so that a list
            of images is ``([image, image],)``. By default made from the model's ``example_input_array``, from the
            configuration of a timm model, or from the first convolution or linear layer. A model whose path depends on
            its input needs an example that takes the path of its use.
        treat: what modules of unknown classes are, as in :func:`normzoo.convert_norms`; those that compute batch norm,
            or frozen batch norm, are recognised without.

    Returns:
        a :class:`~normzoo.convert.FoldReport`: what was folded into what, and why each other norm was left.

    Raises:
        ValueError: if a normalization layer is in training mode, if there is none, if the model cannot be run without
            ``example``, or if it uses its layers in a way that was not seen and so does not compute what it did.
            Parameters and modules are then as they were.

    The model computes the same up to rounding: to 1e-12 of its outputs in float64, to about 1e-5 in float32, or more
    where a network itself amplifies rounding; it is compared on the example: outputs where they can be compared, with
    the first run's selections where a model selects by its values (top-k, thresholds, NMS), else the outputs of the
    layers. Weights that change are new parameters,
    so an optimizer made before does not know them: fold when training is over.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> [(site.name, site.into) for site in fold_norms(model)]
        [('1', '0')]
        >>> model[1]
        Identity()
    """
    return fold(model, example, treat)
