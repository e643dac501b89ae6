"""The machine's limit: the time that one step's matrix products need by themselves, at the model's shapes."""

import time

import torch
from protocol import Session

SETTLED = 0.2  # small products are repeated for so many seconds


def seconds_of_step(session: Session, dtype: torch.dtype) -> float:
    """Time of all products of one step: each shape forward, for the input's gradient and for the weight's."""
    tokens, total = session.sizes.tokens, 0.0
    for (inputs, outputs), count in session.sizes.matrices.items():
        x, y = torch.randn(tokens, inputs, dtype=dtype), torch.randn(tokens, outputs, dtype=dtype)
        weight = torch.randn(outputs, inputs, dtype=dtype)
        # Into memory that is there already: the kernel's page faults are not the multiplier's fault.
        grad_x, out, grad_weight = x.clone(), y.clone(), weight.clone()
        start, seconds, repeats = time.perf_counter(), 0.0, 0
        while seconds < SETTLED:
            torch.mm(x, weight.T, out=out)
            torch.mm(y, weight, out=grad_x)
            torch.mm(y.T, x, out=grad_weight)
            seconds, repeats = time.perf_counter() - start, repeats + 1
        total += count * seconds / repeats
    return total


def main() -> None:
    """Measure once for each step the driver asks for."""
    session = Session(__doc__)
    name = "float32" if session.cell.precision == "fp32" else "bfloat16"
    dtype = getattr(torch, name)
    session.ready(0, name, torch.get_num_threads(), torch=torch.__version__)
    while session.step_done(0.0, seconds_of_step(session, dtype)):
        pass


if __name__ == "__main__":
    main()
