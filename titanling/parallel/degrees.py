"""How many ranks do what, and whether a model divides so. Imports no torch, so that a mismatch costs no start-up."""

from dataclasses import dataclass
from math import gcd

from titanling.config.schema import Compile, Data, Model, Parallelism, Training, Validation
from titanling.errors import UserError
from titanling.model.presets import LlamaShape, resolve_shape
from titanling.parallel.stages import SCHEDULES, cut_layers


@dataclass(frozen=True)
class Degrees:
    """Sizes of the mesh's dimensions, outermost first; their product is the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that share one copy of a parameter under FSDP: context-parallel ranks need the same weights too."""
        return self.dp_shard * self.cp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def ddp(self) -> bool:
        """Whether there are copies of whole models and nothing else."""
        return self.dp_replicate == self.world > 1


KEYS = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}


def resolve_degrees(settings: Parallelism, world: int) -> Degrees:
    """Fill in -1 and check the degrees against the world size. Raises UserError if they do not multiply to it."""
    sizes = {name: getattr(settings, key) for name, key in KEYS.items()}
    if sizes["dp_shard"] == -1:
        others = sizes["pp"] * sizes["dp_replicate"] * sizes["cp"] * sizes["tp"]
        sizes["dp_shard"] = max(1, world // others)
    degrees = Degrees(**sizes)
    if degrees.world != world:
        asked = [f"{key} = {getattr(settings, key)}" for key in KEYS.values() if getattr(settings, key) != 1]
        raise UserError(
            f"parallelism.{' × '.join(asked) or KEYS['dp_shard'] + ' = 1'} does not fit {world}"
            f" process{'es' if world > 1 else ''} (NGPU × NNODES); the product of all degrees must be the number of"
            " processes"
        )
    return degrees


def accumulation_steps(training: Training, dp: int) -> int:
    """Micro-batches in one optimizer step on each rank. Raises UserError if the global batch does not divide."""
    together = training.local_batch_size * dp
    if training.global_batch_size == -1:
        return 1
    if training.global_batch_size % together:
        raise UserError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of"
            f" training.local_batch_size = {training.local_batch_size} × {dp} data-parallel ranks = {together}"
        )
    return training.global_batch_size // together


def sequences_per_step(training: Training, dp: int) -> int:
    """Sequences in one optimizer step of all ranks together. Raises UserError as `accumulation_steps`."""
    return training.local_batch_size * dp * accumulation_steps(training, dp)


def resharding(settings: Parallelism, degrees: Degrees) -> bool | int:
    """Whether FSDP frees gathered parameters after a block's forward pass; a number: keeps them over so many ranks."""
    wanted = settings.fsdp_reshard_after_forward
    if wanted == "default":
        # Every micro-batch of a pipeline would gather them again.
        return degrees.pp == 1
    return wanted if isinstance(wanted, int) else wanted == "always"


def loss_of_hidden(settings: Parallelism, degrees: Degrees) -> bool:
    """Whether the loss is computed from hidden states, a chunk of logits at a time, and not from all logits.

    A pipeline's schedule hands logits to the loss, and whole logits are what disable_loss_parallel asks for.
    """
    return degrees.pp == 1 and (degrees.tp == 1 or not settings.disable_loss_parallel)


def resolve_layout(
    model: Model,
    parallelism: Parallelism,
    training: Training,
    data: Data,
    validation: Validation,
    compile: Compile,
    world: int,
) -> tuple[LlamaShape, Degrees]:
    """The model and the degrees of these tables on `world` ranks. Raises UserError if they do not fit each other."""
    shape = resolve_shape(model)
    degrees = resolve_degrees(parallelism, world)
    accumulation_steps(training, degrees.dp)
    check_layout(parallelism, degrees, shape, training, compile)
    for stage in data.stages:
        if stage.seq_len is not None:
            check_sequence("data.stages: seq_len", stage.seq_len, degrees)
    if validation.enable and validation.seq_len is not None:
        check_sequence("validation.seq_len", validation.seq_len, degrees)
    return shape, degrees


def check_layout(
    settings: Parallelism, degrees: Degrees, shape: LlamaShape, training: Training, compile: Compile
) -> None:
    """Whether the model and its sequences divide by the degrees. Raises UserError naming the key that does not."""
    _check_tensor(settings, degrees, shape)
    check_sequence("training.seq_len", training.seq_len, degrees)
    kept = settings.fsdp_reshard_after_forward
    if isinstance(kept, int) and degrees.fsdp % kept:
        raise UserError(
            f"parallelism.fsdp_reshard_after_forward = {kept} does not divide the {degrees.fsdp} ranks that share a"
            " parameter (data_parallel_shard_degree × context_parallel_degree)"
        )
    if training.enable_cpu_offload and degrees.fsdp == 1:
        raise UserError("training.enable_cpu_offload = true needs FSDP: data_parallel_shard_degree above 1")
    if degrees.pp > 1:
        _check_pipeline(settings, degrees, shape, training)
        if compile.enable and SCHEDULES[settings.pipeline_parallel_schedule.lower()].splits_backward:
            raise UserError(
                f'parallelism.pipeline_parallel_schedule = "{settings.pipeline_parallel_schedule}" splits the backward'
                " pass, which compiled blocks cannot; set compile.enable = false, or use Interleaved1F1B"
            )


def check_sequence(key: str, seq_len: int, degrees: Degrees) -> None:
    """Whether sequences of this length (the value of `key`) divide by the context- and tensor-parallel ranks."""
    # Two pieces of each sequence per context-parallel rank, an early and a late one; then a share per tensor rank.
    pieces = 2 * degrees.cp if degrees.cp > 1 else 1
    if seq_len % pieces or (seq_len // degrees.cp) % degrees.tp:
        unit = degrees.cp * degrees.tp * pieces // gcd(pieces, degrees.cp * degrees.tp)
        raise UserError(
            f"{key} = {seq_len} does not divide by context_parallel_degree = {degrees.cp} (two pieces each) and"
            f" tensor_parallel_degree = {degrees.tp}; use a multiple of {unit}"
        )


def _check_tensor(settings: Parallelism, degrees: Degrees, shape: LlamaShape) -> None:
    tp = degrees.tp
    for key in ("n_kv_heads", "n_heads", "ffn_dim"):
        if getattr(shape, key) % tp:
            possible = gcd(gcd(shape.n_heads, shape.n_kv_heads), shape.ffn_dim)
            fits = ", ".join(str(n) for n in range(1, possible + 1) if possible % n == 0)
            raise UserError(
                f"parallelism.tensor_parallel_degree = {tp} does not divide model.{key} = {getattr(shape, key)};"
                f" this model can use {fits}"
            )
    if settings.enable_async_tensor_parallel and tp == 1:
        raise UserError("parallelism.enable_async_tensor_parallel = true needs tensor_parallel_degree above 1")


def _check_pipeline(settings: Parallelism, degrees: Degrees, shape: LlamaShape, training: Training) -> None:
    if shape.tie_embeddings:
        raise UserError(
            f"parallelism.pipeline_parallel_degree = {degrees.pp}: the tied embedding would be on the first and the"
            " last stage; set model.tie_embeddings = false, or pipeline_parallel_degree = 1"
        )
    schedule = SCHEDULES[settings.pipeline_parallel_schedule.lower()]
    stages = len(cut_layers(settings, degrees.pp, shape.n_layers))
    sequences = training.local_batch_size * accumulation_steps(training, degrees.dp)
    size = settings.pipeline_parallel_microbatch_size
    if sequences % size:
        raise UserError(
            f"parallelism.pipeline_parallel_microbatch_size = {size} does not divide the {sequences} sequences of a"
            " step on one rank (training.global_batch_size / data-parallel ranks)"
        )
    problem = schedule.problem(sequences // size, degrees.pp, stages)
    if problem:
        raise UserError(
            f'parallelism.pipeline_parallel_schedule = "{settings.pipeline_parallel_schedule}" {problem}; raise'
            " training.global_batch_size or use GPipe, which takes any number"
        )
