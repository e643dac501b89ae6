"""Every layout against one process: each group is one torchrun of layouts.py, whose figures are judged here.

Bounds: float32 sums in another order, 1e-5 (measured: 1.5e-6, compiled 6e-6). Half precision against float32 on these
models: bfloat16 (8 bits) loss 1e-3, gradient norm 1e-2, any parameter's gradient 3e-2 relative; float16 (11 bits) a
quarter of that.
"""

from pathlib import Path
from typing import Any

import pytest
from helpers import TinyData, launch_ranks

Results = dict[str, Any]
HALF = {"bfloat16": 1.0, "float16": 0.25}


def launch(group: str, ranks: int, folder: Path, data: TinyData) -> Results:
    """Run one group of layouts.py; its figures."""
    return launch_ranks("layouts.py", group, ranks, folder, data, timeout=580)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("two", 2), id="2 ranks"),
        pytest.param(("four", 4), id="4 ranks", marks=pytest.mark.slow),
    ],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Results:
    """The figures of a launch."""
    group, ranks = request.param
    return launch(group, ranks, tmp_path_factory.mktemp(group), tiny_data)


def test_equal_to_one_process(results: Results) -> None:
    """Weights bit by bit at the start; over five steps loss, norm and the gradient of every single parameter."""
    wrong = {case: figures for case, figures in results["parity"].items() if not equal(figures)}
    assert not wrong


def equal(figures: Results) -> bool:
    """Whether one case is as it should be."""
    same = figures["initial_differing"] == [] and figures["final_names"]
    return same and max(figures["loss"], figures["norm"], figures["gradient"]) < 1e-5


def test_half_precision_is_close_to_float32_and_not_equal(results: Results) -> None:
    for case, figures in results["half_precision"].items():
        share = HALF[case.rpartition(" ")[2]]
        assert figures["initial_differing"] == [], case
        assert figures["loss"] < 1e-3 * share, (case, figures)
        assert figures["norm"] < 1e-2 * share, (case, figures)
        assert 1e-4 < figures["gradient"] < 3e-2 * share, (case, figures)


def test_a_nan_on_one_rank_skips_the_step_everywhere(results: Results) -> None:
    for case, ranks in results["non_finite"].items():
        for found in ranks:
            assert found["differing"] == [], case
            assert found["differing_after_next"] == found["tensors"], case
            assert found["skipped"] == [1, 1], case
            assert found["scale_factor"] == (0.5 if case.endswith("float16") else 1.0), case


def test_a_step_without_a_target_changes_nothing_anywhere(results: Results) -> None:
    """And one where only the first data-parallel rank has some is a step as any other."""
    for case, ranks in results["empty"].items():
        for found in ranks:
            assert found["differing"] == [] and found["scale"] and found["counts"] == [1, 0, 0], (case, found)
            assert found["losses"][0] == 0 and 1 < found["losses"][1] < 10, (case, found)
            assert found["differing_after_next"] == found["tensors"], case


def test_stochastic_rounding_is_the_same_under_every_layout(results: Results) -> None:
    for case, ranks in results["stochastic"].items():
        for found in ranks:
            assert found["wrong"] == [] and found["differing"] == [] and found["skipped"] == 1, (case, found)
            assert found["stepped"] > 0.9, (case, found)


def test_checkpoints_are_bitwise_and_independent_of_the_layout(results: Results) -> None:
    for case, found in results["checkpoints"].items():
        assert found == dict.fromkeys(found, []), (case, found)


def test_a_checkpoint_of_each_layout_resumes_under_the_next(results: Results) -> None:
    """Weights and optimizer state bit by bit, and the loss of the step that follows."""
    for index, (case, found) in enumerate(results.get("chain", {}).items()):
        assert found["changed"] == [] and found["step"] == index and found["loss"] < 2e-6, (case, found)


def test_validation_and_generation_are_those_of_one_process(results: Results) -> None:
    for case, found in results["outputs"].items():
        assert found["loss"] < 1e-6 and found["same_text"] and found["tokens"] > 0, (case, found)


def test_a_full_disk_on_one_rank_is_told_to_all(results: Results) -> None:
    for case, ranks in results["failed_save"].items():
        for found in ranks:
            assert "No space left on device" in found["said"] and found["said"] == ranks[0]["said"], case
            assert found["left"] == ["step-000002"] and found["unchanged"], case


@pytest.mark.slow
@pytest.mark.parametrize(("group", "ranks"), [("compiled two", 2), ("compiled four", 4)])
def test_compiled_layers_share_a_graph_and_their_gradients_equal_eager_ones(
    tmp_path: Path, tiny_data: TinyData, group: str, ranks: int
) -> None:
    """The embedding's gradient above all, which torch 2.13 loses under tensor parallelism without our copy of it."""
    for case, figures in launch(group, ranks, tmp_path, tiny_data).items():
        assert equal(figures) and figures["graphs"] == 1, (case, figures)
