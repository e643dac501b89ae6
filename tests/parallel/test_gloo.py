"""FSDP's collectives on CPUs; that they give the right numbers is in the tables of layouts (tests/distributed)."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import free_port, run_python

from titanling.parallel.gloo import SwapAndAdd


@pytest.mark.parametrize("op", [dist.ReduceOp.MAX, dist.ReduceOp.PREMUL_SUM])
def test_what_is_neither_sum_nor_mean_is_refused(op: dist.ReduceOp) -> None:
    output = torch.zeros(2)
    with pytest.raises(ValueError, match="can only be summed or averaged"):
        SwapAndAdd()(output, torch.ones(4), None, op)
    assert not output.any()


SILENT = """
import datetime, sys, time
import torch, torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from titanling.parallel.gloo import SendToAll, SwapAndAdd

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
dist.barrier()
_set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
if dist.get_rank():
    time.sleep(5)
    sys.exit()
start = time.monotonic()
try:
    if sys.argv[1] == "gather":
        SendToAll()(torch.zeros(8), torch.ones(4), dist.group.WORLD)
    else:
        SwapAndAdd()(torch.zeros(4), torch.ones(8), dist.group.WORLD, dist.ReduceOp.SUM)
except RuntimeError:
    print("waited", round(time.monotonic() - start, 1), flush=True)
"""


@pytest.mark.parametrize("what", ["gather", "reduce"])
def test_a_silent_rank_is_waited_for_as_long_as_by_any_collective(tmp_path: Path, what: str) -> None:
    script = tmp_path / "silent.py"
    script.write_text(SILENT, encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    said = run_python(*torchrun, script, what).stdout.split()
    assert said[0] == "waited" and 0.9 < float(said[1]) < 4
