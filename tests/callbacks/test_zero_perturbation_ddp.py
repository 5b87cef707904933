"""With every callback on, a run is bit for bit the run without: the matrix, on each of two real processes on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from perturbation import CELLS, STEPS, assert_sampled, cell_id, differences, every_callback
from ranks import run_ranks

from normzoo.callbacks import Divergence

DEADLINE = 240  # seconds
RANKS = 2
PLANTED = "planted"
# Beside the matrix, and how many batches each has: two optimizers, metrics, state of all kinds, statistics over ranks
EXTRAS = {"gan": STEPS, "metrics": STEPS, "state": 12, "synchronized": STEPS, "static": STEPS}

SCRIPT = '''
import os, sys, warnings
from pathlib import Path
import torch
warnings.filterwarnings("ignore")
sys.path.insert(0, os.environ["TESTS"])
import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
import perturbation
from perturbation import CellNet, cell_id, every_callback, fit, fit_cell
from perturbation_modules import KeepingNet, MetricsNet, SmallGAN, SynchronizedNet, gan_loss_of_a_batch

folder, planted, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
cells = perturbation.CELLS[: int(sys.argv[3])]

class OnOneRank(pl.Callback):
    """The breach that the comparison must notice, on the rank where it is."""
    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            pl_module.losses.append(0.0)

def ddp(**options):
    return {"strategy": DDPStrategy(process_group_backend="gloo", **options), "devices": int(os.environ["WORLD_SIZE"])}

def fit_one(name, cell, callbacks):
    return fit_cell(folder / name, cell, callbacks, **ddp())

def save(name, run, callbacks):
    without = run(f"{name}-off", [])
    with_all = run(name, callbacks)
    torch.save((without, with_all, len(callbacks[2].state_dict()["recent"])), folder / f"{name}.rank{rank}.pt")

for cell in cells:
    save(cell_id(cell), lambda name, callbacks: fit_one(name, cell, callbacks), every_callback(several=True))

of_gan = every_callback(several=False, loss=gan_loss_of_a_batch)
extras = {
    "gan": (lambda: SmallGAN(True), {"find_unused_parameters": True}, {"max_steps": 16}),
    "metrics": (MetricsNet, {}, {}),
    "state": (KeepingNet, {"gradient_as_bucket_view": True}, {"accumulate_grad_batches": 2}),
    "synchronized": (SynchronizedNet, {"broadcast_buffers": False}, {}),
    "static": (CellNet, {"static_graph": True}, {}),
}
for name, (make, of_ddp, options) in extras.items():
    save(name, lambda name, callbacks: fit(folder / name, make, callbacks, **ddp(**of_ddp), **options),
         of_gan if name == "gan" else every_callback(several=True))

cell = cells[-1]
pair = fit_one(f"{planted}-off", cell, []), fit_one(planted, cell, [OnOneRank()])
torch.save(pair, folder / f"{planted}.rank{rank}.pt")
torch.distributed.destroy_process_group()
'''


@pytest.mark.slow
@pytest.mark.parametrize("number", [len(CELLS)])  # of cells; check_measurement has the matrix of each
def test_runs_on_two_ranks_are_the_same_with_all_callbacks(tmp_path: Path, number: int) -> None:
    cells = CELLS[:number]
    run_ranks(tmp_path, SCRIPT, RANKS, str(tmp_path), PLANTED, str(number), deadline=DEADLINE)
    expected = {cell_id(c): STEPS * c["accumulation"] for c in cells} | EXTRAS
    compared, found = set(), []
    for name, batches in expected.items():
        ranks = []
        for rank in range(RANKS):
            without, with_all, judged = torch.load(tmp_path / f"{name}.rank{rank}.pt", weights_only=False)
            found += differences(without, with_all, f"{name}, rank {rank}: ")
            assert with_all["steps"][0] == (2 * STEPS if name == "gan" else STEPS)
            assert judged == batches
            compared.add((name, rank))
            ranks.append(with_all)
        assert not differences(ranks[0]["weights"], ranks[1]["weights"])
        if name not in EXTRAS:  # each rank trains on batches of its own
            assert differences(ranks[0]["plain attributes"], ranks[1]["plain attributes"])
        sampling = [c for c in every_callback(several=True) if not isinstance(c, Divergence)]
        if name != "gan":
            assert_sampled(tmp_path / name, sampling, list(range(STEPS)))
    assert_sampled(tmp_path / "gan", every_callback(several=False)[:2], list(range(2 * STEPS)))
    assert not found, "\n".join(found)
    assert len(compared) == (len(cells) + len(EXTRAS)) * RANKS
    assert {p.name for p in tmp_path.glob("*.pt")} == {
        f"{name}.rank{r}.pt" for name in [*expected, PLANTED] for r in range(RANKS)
    }
    for rank in range(RANKS):  # a breach on one rank is noticed there
        assert bool(differences(*torch.load(tmp_path / f"{PLANTED}.rank{rank}.pt", weights_only=False))) == (rank == 1)
