"""One value for each channel in training: refused wherever a deviation from the batch's mean is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from norm_cases import CHANNELS, ONE_EACH, sample
from ranks import run_ranks

import normzoo

REFUSE = {case.name for case in ONE_EACH if case.refuses_shape((1, CHANNELS), training=True)} - {"instance"}
GO_ON = {"batch_group", "frozen_batch", "online", "power"}


def test_every_layer_with_statistics_of_the_batch_refuses_one_value_or_is_known_to_go_on():
    names = normzoo.list_norms()
    of_batch = {n for n in names if "running_var" in dict(normzoo.create_norm(n, 32).named_buffers())}
    assert of_batch | {n for n in names if normzoo.norm_info(n).batch_statistics} == REFUSE | GO_ON
    assert not REFUSE & GO_ON


@pytest.mark.parametrize("options", [{"groups": CHANNELS}, {"groups": 1}], ids=str)
def test_groups_of_one_channel_have_one_value(options):
    layer = normzoo.create_norm("batch_group", CHANNELS, **options)
    if options["groups"] == 1:
        layer(sample((1, CHANNELS), torch.float32))
        assert layer.running_var[0] > 0.5
    else:
        with pytest.raises(ValueError, match="with as many groups as channels needs more than one value per channel"):
            layer(torch.ones(1, CHANNELS))


@pytest.mark.parametrize(("batch", "refused"), [(7, True), (8, False), (1, True), (3, False)])
def test_a_virtual_batch_of_one_sample_is_refused_without_space(batch, refused):
    layer, x = normzoo.create_norm("ghost_batch", CHANNELS, ghost_size=3), torch.randn(batch, CHANNELS)
    if refused:
        with pytest.raises(ValueError, match="with ghost_size=3 a virtual batch has one value per channel"):
            layer(x)
    else:
        layer(x)
    layer(x[..., None].repeat(1, 1, 2))  # two positions suffice


@pytest.mark.parametrize("name", sorted(REFUSE - {"ghost_batch"}))
def test_one_value_is_refused_when_traced_too(name):
    layer = normzoo.create_norm(name, CHANNELS)
    x = torch.ones(1, CHANNELS)
    with pytest.raises(ValueError, match="needs more than one value per channel"):
        torch.func.vmap(layer)(x[None])
    with pytest.raises(ValueError, match="needs more than one value per channel"):
        normzoo.create_norm(name, CHANNELS, device="meta")(x.to("meta"))


RANKS = """
import json, os, torch, torch.distributed as dist, normzoo
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for name in sorted(n for n in normzoo.list_norms() if "sync" in normzoo.norm_info(n).options):
    options = {"groups": 6} if name == "batch_group" else {}
    for sizes in ((1, 0), (0, 1), (1, 1), (1, 2)):
        torch.manual_seed(0)
        whole = torch.randn(sum(sizes), 6, dtype=torch.float64)
        twin, layer = (normzoo.create_norm(name, 6, sync=s, dtype=torch.float64, **options) for s in (False, True))
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        part = whole.split(sizes)[rank]
        try:
            y = layer(part)
            same = torch.allclose(y, twin.__class__.forward(twin, whole).split(sizes)[rank]) if sum(sizes) > 1 else None
            result = f"same as one process: {same}"
        except ValueError as error:
            moved = [k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])]
            result = f"{error} {moved}"
        found[f"{name} {sizes}"] = result
    dist.barrier()
open(f"rank{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


def test_over_ranks_only_a_single_value_in_all_of_them_is_refused(tmp_path):
    run_ranks(tmp_path, RANKS, 2)
    for rank in range(2):
        found = json.loads(Path(tmp_path, f"rank{rank}.json").read_text())
        assert {case.split(" ", 1)[0] for case in found} == (REFUSE | {"batch_group", "power"}) - {"ghost_batch"}
        for case, text in found.items():
            name, sizes = case.split(" ", 1)
            if sizes not in ("(1, 0)", "(0, 1)"):
                want = "same as one process: True"
            elif name == "power":
                want = "same as one process: None"
            else:
                want = (
                    "needs more than one value per channel when training, over all ranks together; "
                    f"the input has shape ({sizes[1 + 3 * rank]}, 6) []"
                )
            assert text.endswith(want), (case, rank, text)
