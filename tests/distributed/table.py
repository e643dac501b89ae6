"""The parity table: which layouts, recomputation and compilation are compared with one process, on which model.

Every layout appears; recomputation and accumulation rotate over them, so that each pair of choices that meet in our
code appears somewhere. Names say what a case is; `settings` is all that differs from one process.
"""

from typing import Any, NamedTuple

Settings = dict[str, Any]

GLOBAL_BATCH = 16
# Neither vocabulary nor head_dim divides by the ranks; at four ranks some hold no row of q_norm and k_norm.
MODELS: dict[str, Settings] = {
    "tied": {"model.vocab_size": 323, "model.tie_embeddings": True, "model.qk_norm": True, "model.head_dim": 6},
    "untied": {"model.vocab_size": 321, "model.tie_embeddings": False},
    "four heads": {
        "model.vocab_size": 321,
        "model.n_kv_heads": 4,
        "model.tie_embeddings": False,
        "model.qk_norm": True,
    },
    # Stages of unequal length: the embedding and the head count as a layer each.
    "deep": {"model.vocab_size": 323, "model.n_layers": 6, "model.tie_embeddings": False, "model.qk_norm": True},
    "masked": {
        "model.vocab_size": 323,
        "model.n_layers": 4,
        "model.tie_embeddings": False,
        "data.document_mask": "causal",
    },
    "cut into shorter rows": {
        "model.vocab_size": 323,
        "model.n_layers": 4,
        "model.tie_embeddings": False,
        "data.document_mask": "causal",
        "data.stages": [{"from_step": step, "seq_len": length} for step, length in ((0, 16), (1, 32), (2, 8))],
    },
    "smoothed": {
        "model.vocab_size": 321,
        "model.tie_embeddings": False,
        "training.label_smoothing": 0.1,
        "training.z_loss": 1e-3,
    },
    # As many rows as make Inductor split its reductions (pytorch #193061 lost gradients there).
    "wide": {"model.dim": 128, "model.qk_norm": True, "model.tie_embeddings": True, "training.seq_len": 256},
}
RECOMPUTED: dict[str, Settings] = {
    "": {},
    "full": {"activation_checkpoint.mode": "full"},
    "op": {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    "2": {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "2"},
    "budget": {"activation_checkpoint.mode": "memory_budget", "activation_checkpoint.memory_budget": 0.3},
}
SCHEDULES = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
ONE_STAGE_PER_RANK = SCHEDULES[:2]


def mesh(replicate: int = 1, shard: int = 1, *, pp: int = 1, cp: int = 1, tp: int = 1, **more: Any) -> Settings:
    """The degrees of a layout, and `more` of [parallelism]."""
    degrees = {
        "data_parallel_replicate_degree": replicate,
        "data_parallel_shard_degree": shard,
        "pipeline_parallel_degree": pp,
        "context_parallel_degree": cp,
        "tensor_parallel_degree": tp,
    }
    return {f"parallelism.{key}": value for key, value in (degrees | more).items()}


def pipeline(schedule: str = "1F1B", replicate: int = 1, shard: int = 1, pp: int = 2, **more: Any) -> Settings:
    """A pipeline whose micro-batches are two sequences."""
    return mesh(
        replicate, shard, pp=pp, pipeline_parallel_schedule=schedule, pipeline_parallel_microbatch_size=2, **more
    )


class Case(NamedTuple):
    """One row of the table."""

    model: str
    layout: Settings
    recomputed: str = ""
    accumulation: int = 1
    compiled: str = ""
    """The compiler's backend: "inductor", or "aot_eager" where only what leads to it, the tracing, is of interest."""

    def settings(self) -> Settings:
        """All that differs from one process."""
        degrees = (self.layout[f"parallelism.data_parallel_{kind}_degree"] for kind in ("replicate", "shard"))
        replicate, shard = degrees
        local = {"training.local_batch_size": GLOBAL_BATCH // (replicate * shard) // self.accumulation}
        return self.layout | RECOMPUTED[self.recomputed] | self.compilation() | local

    def compilation(self) -> Settings:
        """What compiles it."""
        return {"compile.enable": True, "compile.backend": self.compiled} if self.compiled else {}


def two_ranks() -> dict[str, Case]:
    """Each dimension alone, plain and under two of the three kinds of recomputation, in turn; each schedule."""
    alone = {"ddp": mesh(2), "fsdp": mesh(1, 2), "tp": mesh(tp=2), "cp": mesh(cp=2), "pp": pipeline()}
    cases = {}
    for place, (name, layout) in enumerate(alone.items()):
        models = ("untied", "deep") if name == "pp" else ("tied", "untied")
        for index, recomputed in enumerate(("", "full", "op", "2")):
            if index == 1 + place % 3:
                continue
            cases[f"{name} {recomputed}"] = Case(models[index % 2], layout, recomputed, accumulation=1 + index // 2)
    whole = {"disable_loss_parallel": True}
    cases |= {
        "fsdp, never resharded": Case("tied", mesh(1, 2, fsdp_reshard_after_forward="never"), accumulation=2),
        "tp, tied, accumulated": Case("tied", mesh(tp=2), accumulation=2),
        "tp, tied, whole logits": Case("tied", mesh(tp=2, **whole)),
        "tp, untied, whole logits": Case("untied", mesh(tp=2, **whole), accumulation=2),
        "pp, one sequence each": Case("untied", mesh(pp=2)),
        "tp, smoothed": Case("smoothed", mesh(tp=2)),
        "pp, smoothed": Case("smoothed", pipeline()),
    }
    for name in ("fsdp", "tp", "cp", "pp"):
        cases[f"{name}, masked, cut"] = Case("cut into shorter rows", alone[name], "op", accumulation=2)
    layers = {f"pipeline_parallel_{end}_stage_less_layers": 0 for end in ("first", "last")}
    cases["pp, ZBVZeroBubble, masked"] = Case("masked", pipeline("ZBVZeroBubble", **layers))
    for index, schedule in enumerate(SCHEDULES):
        recomputed = ("", "2", "full", "op")[index % 4]
        model = "untied" if schedule in ONE_STAGE_PER_RANK else "deep"
        cases[f"pp, {schedule} {recomputed}"] = Case(model, pipeline(schedule), recomputed, accumulation=1 + index % 2)
    return cases


def four_ranks() -> dict[str, Case]:
    """Each dimension over four ranks, and every pair of dimensions."""
    return {
        "fsdp4": Case("tied", mesh(1, 4), "2"),
        "fsdp4, kept over 2": Case("tied", mesh(1, 4, fsdp_reshard_after_forward=2), "full", accumulation=2),
        "fsdp4, 2 blocks ahead": Case("deep", mesh(1, 4, fsdp_prefetch=2)),
        "hsdp2x2": Case("tied", mesh(2, 2), "op", accumulation=2),
        "tp4": Case("four heads", mesh(tp=4), "full"),
        "fsdp2 x tp2": Case("tied", mesh(1, 2, tp=2), "op", accumulation=2),
        "ddp2 x tp2": Case("tied", mesh(2, 1, tp=2), "2", accumulation=2),
        "cp4": Case("untied", mesh(cp=4)),
        "fsdp2 x cp2": Case("tied", mesh(1, 2, cp=2), "full", accumulation=2),
        "cp2 x tp2": Case("tied", mesh(cp=2, tp=2), "op"),
        "pp2 x fsdp2": Case("untied", pipeline(shard=2), "2"),
        "pp2 x fsdp2, resharded": Case(
            "untied", pipeline(shard=2, fsdp_reshard_after_forward="always"), accumulation=2
        ),
        "pp2 x ddp2": Case("untied", pipeline(replicate=2)),
        "pp2 x tp2": Case("untied", pipeline(tp=2), "full"),
        "pp2 x cp2": Case("untied", pipeline(cp=2), "op"),
        "pp2 x fsdp2, ZBVZeroBubble": Case("deep", pipeline("ZBVZeroBubble", shard=2)),
        "cp2 x tp2, masked": Case("masked", mesh(cp=2, tp=2), "full"),
        "pp2 x cp2, masked": Case("masked", pipeline(cp=2)),
        "pp4": Case("deep", pipeline(pp=4), "full"),
    }


def on_the_kernels_ops(compiled: str = "") -> dict[str, Case]:
    """Where their inputs are DTensors, and where FSDP hands them weights; with and without recomputation."""
    return {
        "tp": Case("deep", mesh(tp=2), "op", compiled=compiled),
        "fsdp": Case("deep", mesh(1, 2), "" if compiled else "full", compiled=compiled),
    }


def compiled_two() -> dict[str, Case]:
    """What the compiler meets on two ranks; six layers, so that a graph for each would be seen."""
    return {
        "fsdp, compiled": Case("wide", mesh(1, 2), compiled="inductor"),
        "tp full, compiled": Case("deep", mesh(tp=2), "full", compiled="inductor"),
        "pp, compiled": Case("deep", pipeline(), "full", compiled="aot_eager"),
        "cp, masked, compiled": Case("masked", mesh(cp=2), "op", compiled="aot_eager"),
        "pp, masked, compiled": Case("masked", pipeline(), compiled="aot_eager"),
        # The budget is the process's: behind it, nothing is compiled without.
        "tp budget, compiled": Case("deep", mesh(tp=2), "budget", compiled="inductor"),
    }


def compiled_four() -> dict[str, Case]:
    """DTensors of two meshes at once."""
    return {
        "fsdp2 x tp2 op, compiled": Case("deep", mesh(1, 2, tp=2), "op", compiled="inductor"),
        "fsdp2 x tp2, masked, compiled": Case("masked", mesh(1, 2, tp=2), compiled="aot_eager"),
    }
