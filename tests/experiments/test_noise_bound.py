"""The noise of an update by inner products, against the gradients of batches themselves."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from experiments_small import FewImages, SmallTask
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from normzoo.experiments import NoiseBound
from normzoo.experiments.noise_bound import sample_gradients
from normzoo.functional import gradient_noise


def small(**options: object) -> NoiseBound:
    seed_everything(0, verbose=False)
    options = {"samples": 12, "batch_sizes": (2, 5, 12), "learning_rates": (0.5, 0.1), "draws": 4000, **options}
    made = NoiseBound(FewImages(), SmallTask(norm=False), **options)  # type: ignore[arg-type]
    made.prepare()
    return made


def rows(of: NoiseBound) -> pd.DataFrame:
    return pd.DataFrame([row for part in of.parts() for row in of.rows(part)])


def test_measured_noise_is_that_of_the_gradients_of_batches() -> None:
    of = small(draws=4)
    images, labels = of._population()
    parameters = [*of.task.parameters()]

    def gradient(chosen: list[int]) -> torch.Tensor:
        loss = F.cross_entropy(of.task(images[chosen]), labels[chosen])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()

    for way, b in (("without replacement", 5), ("with replacement", 5)):
        seed_everything(7, verbose=False)
        table = pd.DataFrame(of.rows({"sampling": way, "batch_size": b})).set_index(["curve", "learning_rate"])
        seed_everything(7, verbose=False)
        if way == "with replacement":
            batches = torch.randint(12, (4, b)).tolist()
        else:
            batches = torch.rand(4, 12, dtype=torch.float64).topk(b, sorted=False).indices.tolist()
        whole = gradient([*range(12)])
        for rate in (0.5, 0.1):
            squares = torch.stack([(rate * (gradient(batch) - whole)).square().sum() for batch in batches])
            assert table["value"]["measured", rate] == pytest.approx(squares.mean().item(), rel=1e-4)
            assert table["error"]["measured", rate] == pytest.approx((squares.std() / 2).item(), rel=1e-4)
    single = torch.stack([gradient([i]) for i in range(12)])
    assert table["noise"].iloc[0] == pytest.approx(gradient_noise(single).item(), rel=1e-4)


def test_one_factor_is_exact_for_each_way_to_draw_and_the_other_is_not() -> None:
    seed_everything(1, verbose=False)
    table = rows(small())
    compared = table.dropna(subset="deviation").drop_duplicates(["sampling", "batch_size", "curve"])
    worst = compared.groupby("curve")["deviation"].agg(lambda v: v.abs().max())
    assert set(worst.index) == {"1", "(N-b)/N", "(N-b)/(N-1)"}
    assert worst["1"] < 4
    assert worst["(N-b)/(N-1)"] < 4
    assert worst["(N-b)/N"] > 4
    right, wrong = (compared[compared["curve"] == f"(N-b)/{n}"]["relative"] for n in ("(N-1)", "N"))
    assert ((1 + wrong.to_numpy()) / (1 + right.to_numpy())).tolist() == pytest.approx([12 / 11] * len(right))


def test_a_batch_of_all_samples_has_no_noise_and_no_prediction_to_compare() -> None:
    table = rows(small(draws=50))
    whole = table[(table["batch_size"] == 12) & (table["sampling"] == "without replacement")]
    assert (whole[whole["curve"] == "measured"]["value"] == 0).all()
    assert (whole["prediction"].dropna() == 0).all()
    assert whole["deviation"].isna().all()
    assert (whole[whole["curve"] == "alpha^2 C / b"]["value"] > 0).all()


class Mixing(LightningModule):
    """Normalizes over the batch, and gives single samples a gradient all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 676, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


def test_networks_that_mix_samples_are_refused() -> None:
    images, labels = torch.randn(6, 1, 28, 28), torch.arange(6)
    with pytest.raises(ValueError, match="take one without batch normalization and dropout"):
        sample_gradients(Mixing(), images, labels)
    task = Mixing()
    task.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    with pytest.raises(ValueError, match="the gradient of a single sample cannot be had"):
        sample_gradients(task, images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": (2, 13)}, r"batch_sizes must be from 1 to samples \(12\), not \[2, 13\]"),
        ({"batch_sizes": ()}, "batch_sizes must be from 1"),
        ({"learning_rates": (0.1, 0.0)}, "learning_rates must be above 0"),
        ({"draws": 1}, "samples and draws must be at least 2, not 12 and 1"),
        ({"samples": 100_000}, "samples is 100000, and the data has 5984 in its training batches"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
