"""Singular values of products of Gaussian matrices, beside the law that they follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normzoo.experiments.experiment import Column, Experiment, Figure
from normzoo.functional import fuss_catalan_cdf, fuss_catalan_edge, kolmogorov_smirnov

_MEASURED, _LAW = "singular values", "Fuss-Catalan law"
_BEYOND = 1.08  # of the law's support: how far histograms go
_HIGHEST = 1.5  # density that figures go to; that of several factors is infinite at 0


class RandomMatrices(Experiment):
    """Singular values of products of square Gaussian matrices, and their distance from the Fuss-Catalan law.

    A network at initialization, without its activations, is such a product: the more factors it has, the more singular
    values are near 0 and the larger is the largest one. Each part makes one product for each size, and as many
    independent values of the law itself, whose distance from it is that of a sample that is nothing but the law.

    Args:
        factors: numbers K of matrices that are multiplied, with independent entries of mean 0 and variance 1 / n.
        size: n, rows and columns of the matrices whose histogram is drawn.
        smaller: further sizes, for the distance only.
        products: how many products there are for each number of factors.
        bins: of a histogram from 0 to 1.08 times the edge of the law.
        seed: of the matrices.

    Raises:
        ValueError: for numbers below 1, or no factors.

    Source: Bjorck et al. 2018, arXiv 1806.02375, on products of random matrices; the law: Penson & Zyczkowski 2011,
    arXiv 1103.3453.
    """

    name = "random_matrices"
    row = "a product of matrices, or the law"
    columns = (
        Column("factors", "text", "how many matrices are multiplied"),
        Column("source", "text", f"whose values they are: `{_MEASURED}` of a product, or `{_LAW}`"),
        Column("product", "int", "number of the product, from 0"),
        Column("size", "int", "n, rows and columns of the matrices of the histogram"),
        Column("singular_value", "curve", "middles of the histogram's bins"),
        Column("density", "curve", "share of the values in each bin, over its width"),
        Column("sizes", "curve", "n, the sizes of which there is a distance"),
        Column("distance", "curve", "Kolmogorov-Smirnov distance from the law, for each size"),
        Column("largest", "curve", "the largest singular value for each size; of the law, its edge"),
    )
    figures = (
        Figure(
            "Singular values of products of Gaussian matrices",
            "curve",
            x="singular_value",
            y="density",
            lines=("source",),
            facet="factors",
            y_range=(0.0, _HIGHEST),
            x_label="singular value",
            y_label=f"density (at the top: {_HIGHEST} or more)",
        ),
        Figure(
            "Distance from the Fuss-Catalan law",
            "curve",
            x="sizes",
            y="distance",
            lines=("source",),
            facet="factors",
            x_scale="log",
            y_scale="log",
            x_label="rows and columns n",
            y_label="Kolmogorov-Smirnov distance",
        ),
    )

    def __init__(
        self,
        factors: Sequence[int] = (1, 3, 5),
        size: int = 512,
        smaller: Sequence[int] = (16, 32, 64, 128, 256),
        products: int = 10,
        bins: int = 40,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for name, values in (
            ("factors", factors),
            ("size", [size]),
            ("smaller", [*smaller, 1]),
            ("products", [products]),
            ("bins", [bins]),
        ):
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least 1, not {min(values) if values else 'empty'}")
        self.factors, self.size, self.smaller, self.products, self.bins = factors, size, smaller, products, bins

    def parts(self) -> list[dict[str, int]]:
        """Each number of factors, for each product."""
        return [{"factors": k, "product": i} for i in range(self.products) for k in self.factors]

    def rows(self, part: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """A row of the product's singular values, and one of the law."""
        k, edge = part["factors"], fuss_catalan_edge(part["factors"])
        edges = torch.linspace(0, _BEYOND * edge, self.bins + 1, dtype=torch.float64)
        sizes = sorted({*self.smaller, self.size})
        values = {n: product_singular_values(n, k) for n in sizes}
        independent = [torch.rand(n, dtype=torch.float64) for n in sizes]  # F of a value of the law is uniform
        counts = torch.histogram(values[self.size], edges).hist / self.size
        common = {
            "factors": f"{k} {'matrix' if k == 1 else 'matrices'}",
            "product": part["product"],
            "size": self.size,
            "singular_value": ((edges[1:] + edges[:-1]) / 2).tolist(),
            "sizes": [float(n) for n in sizes],
        }
        yield {
            **common,
            "source": _MEASURED,
            "density": (counts / edges.diff()).tolist(),
            "distance": [kolmogorov_smirnov(fuss_catalan_cdf(values[n], k)).item() for n in sizes],
            "largest": [values[n].max().item() for n in sizes],
        }
        yield {
            **common,
            "source": _LAW,
            "density": (fuss_catalan_cdf(edges, k).diff() / edges.diff()).tolist(),
            "distance": [kolmogorov_smirnov(uniform).item() for uniform in independent],
            "largest": [edge] * len(sizes),
        }


def product_singular_values(size: int, factors: int) -> Tensor:
    """(n,) float64 singular values, the largest first, of a product of Gaussian matrices with variances 1 / n."""
    product = torch.eye(size, dtype=torch.float64)
    for _ in range(factors):
        product = product @ torch.randn(size, size, dtype=torch.float64) / math.sqrt(size)
    return torch.linalg.svdvals(product)
