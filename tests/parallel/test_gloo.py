"""FSDP's collectives on CPUs; that they give the right numbers is in the tables of layouts (tests/distributed)."""

import pytest
import torch
import torch.distributed as dist

from titanling.parallel.gloo import SwapAndAdd


@pytest.mark.parametrize("op", [dist.ReduceOp.MAX, dist.ReduceOp.PREMUL_SUM])
def test_what_is_neither_sum_nor_mean_is_refused(op: dist.ReduceOp) -> None:
    output = torch.zeros(2)
    with pytest.raises(ValueError, match="can only be summed or averaged"):
        SwapAndAdd()(output, torch.ones(4), None, op)
    assert not output.any()
