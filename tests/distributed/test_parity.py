"""scripts/parity.py, as a user calls it: equal layouts pass, a layout that computes something else fails."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers import TinyData, clean_env, run_python, tiny_config

# Of one process it leaves alone what it spoils in more.
SPOILED = {
    "what a layer gives": "module.register_forward_hook(lambda module, inputs, output: output * 1.001)",
    "one gradient": "module.register_forward_hook(lambda module, inputs, output: spoil(output))",
}
BROKEN = """
from titanling.parallel.plan import Plan
def spoil(output):
    output.register_hook(lambda gradient: gradient * 1.001)
    return output
class Broken(Plan):
    name, after, needs = "broken", "data", ("tp", "dp_shard")
    def apply(self, model, world):
        module = model.get_submodule("model.layers.0.mlp.up_proj")
        SPOIL
    def describe(self):
        return "wrong on purpose"
"""


def parity(folder: Path, data: TinyData, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script over the tiny config."""
    config = tiny_config(folder, data, {"training.mixed_precision_param": None, "model.dropout": 0.1})
    return run_python("scripts/parity.py", "--config", config, *arguments, env=clean_env(NGPU=str(ranks)))


def test_a_layout_that_is_equal(tmp_path: Path, tiny_data: TinyData) -> None:
    # At this learning rate, what Adam makes of the rounding of next to nothing would show in the third step.
    rate = ("--optimizer.lr=0.1", "--lr_scheduler.warmup_steps=0", "--lr_scheduler.decay_ratio=0.0")
    run = parity(tmp_path, tiny_data, 2, "--steps", "3", "--parallelism.tensor_parallel_degree=2", *rate)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "equal to one process: float32, within 1e-05"
    rows = [line.split() for line in run.stdout.splitlines() if re.match(r" +\d+  ", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"] and all(row[-1].endswith(".weight") for row in rows)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", SPOILED)
def test_a_layout_that_is_not(tmp_path: Path, tiny_data: TinyData, what: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN.replace("SPOIL", SPOILED[what]))
    run = parity(tmp_path, tiny_data, 2, "--steps=1", f'--parallelism.plans=["{tmp_path}/broken.py:Broken"]')
    assert run.returncode == 1, run.stderr
    assert run.stdout.splitlines()[-1] == "DIFFERENT from one process (bound 1e-05)"
    assert re.search(r" 1\.0e-03 model\.layers\.0\.\S+\.weight\n", run.stdout)


def test_input_to_mend(tmp_path: Path, tiny_data: TinyData) -> None:
    run = parity(tmp_path, tiny_data, 1, "--parallelism.tensor_parallel_degree=2")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "does not fit 1 process (NGPU × NNODES)" in run.stderr
