"""Time on the device: graph replay over inputs that no cache holds, and the wall time of eager calls. Also on a CPU."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


class Clock:
    """Times calls on one device. On a CPU, where there are no graphs, both times are wall time."""

    def __init__(self, device: torch.device, smoke: bool = False) -> None:
        self.device, self.smoke = device, smoke
        self.graphs = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.graphs else None
        self._copies: dict[int, float] = {}

    @property
    def cache_bytes(self) -> int:
        """Size of the last-level cache (NVIDIA, AMD); on a CPU a small number, for a dry run."""
        if not self.graphs:
            return 1 << 10
        properties = torch.cuda.get_device_properties(self.device)
        # MI300's Infinity Cache of 256 MiB lies behind the L2 that torch reports.
        behind = 256 << 20 if getattr(properties, "gcnArchName", "").startswith("gfx94") else 0
        return max(properties.L2_cache_size, behind)

    def copies_of_inputs(self, nbytes: int) -> int:
        """How many sets of inputs of `nbytes` make four times the cache, at least two."""
        return max(2, -(-4 * self.cache_bytes // nbytes))

    def device_seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call: a graph of all calls, replayed. Results are kept, so that no two share memory."""
        if not self.graphs:
            return self.wall_seconds(calls)
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for call in calls[:2]:
                call()
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                kept = [call() for call in calls]
            for _ in range(2):
                graph.replay()
            once = self._replay(graph, 1)
            seconds = min(self._replay(graph, max(1, min(100, int(0.01 / once)))) for _ in range(3))
        del kept, graph
        return seconds / len(calls)

    def wall_seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one eager call, as the CPU that makes it sees it."""
        for call in calls[:2]:
            call()
        self._wait()
        rounds = 1 if self.smoke else max(1, 50 // len(calls))
        started = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        self._wait()
        return (time.perf_counter() - started) / (rounds * len(calls))

    def copy_seconds(self, nbytes: int) -> float:
        """Seconds to move `nbytes` in all, half read and half written, by a plain copy. Measured once per size."""
        if nbytes not in self._copies:
            elements = max(1, nbytes // 4)  # two tensors of two bytes each
            pairs = [
                torch.randn(2, elements, device=self.device, dtype=torch.bfloat16)
                for _ in range(self.copies_of_inputs(nbytes))
            ]
            self._copies[nbytes] = self.device_seconds([lambda p=pair: p[0].copy_(p[1]) for pair in pairs])
        return self._copies[nbytes]

    def on_stream(self, call: Call) -> Any:
        """Run a call on the stream that graphs are captured on: a backward pass runs where its forward pass ran."""
        if self._stream is None:
            return call()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = call()
        torch.cuda.synchronize(self.device)
        return result

    def _replay(self, graph: Any, times: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / times

    def _wait(self) -> None:
        if self.graphs:
            torch.cuda.synchronize(self.device)


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the results' file."""
    found: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"processors": properties.multi_processor_count, "cache_mib": properties.L2_cache_size >> 20}
    return found
