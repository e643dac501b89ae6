"""A plan of your own: train everything but the norms.

    ./run_train.sh --parallelism.plans '["docs/examples/freeze_norms.py:FreezeNorms"]'

It applies under every layout, for it is given the model where the layout's own plans have done their part.
"""

from torch import nn

from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan


class FreezeNorms(Plan):
    """Leave the weights of all norms as they are initialised."""

    name = "freeze_norms"  # shown at the start of a run
    after = "pipeline"  # this rank has only its own stages of the model left

    def apply(self, model: nn.Module, world: World) -> None:
        """Called once for each stage, on the meta device: change the model in place."""
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms have the only vectors
                parameter.requires_grad_(False)

    def describe(self) -> str:
        """One line for the start of the run."""
        return "the norms' weights stay as they are"
