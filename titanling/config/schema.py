"""Every table and key of a run's TOML, with type, bounds and meaning.

Tables and keys are torchtitan v0.2.2's wherever the meaning is the same. A field marked `not_yet` is understood but
waits for its feature: any value but its default is refused when a run starts. The docstring under a field is its
documentation: `--help` and docs/configuration.md are made from it.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from titanling.paths import try_expand


def _as_tuple(value: Any) -> Any:
    """TOML has lists; a frozen config wants tuples."""
    return tuple(value) if isinstance(value, list) else value


def _expanded(text: str) -> str:
    try:
        return try_expand(text)
    except ValueError as error:
        raise PydanticCustomError("path", "{why}", {"why": str(error)}) from None


def _expandable(text: str) -> str:
    """What is read where it is used, and as it is written part of what prepared files know of themselves."""
    _expanded(text.partition("=")[2] or text)
    return text


Text = Annotated[str, Field(min_length=1)]
Strings = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
LocalPath = Annotated[Text, AfterValidator(_expanded)]
"""A path, with ~ and $VAR expanded, or where the field says so a URL."""
LocalPaths = Annotated[tuple[LocalPath, ...], BeforeValidator(_as_tuple)]
WrittenPath = Annotated[Text, AfterValidator(_expandable)]
"""A path that is expanded where it is used."""
WrittenPaths = Annotated[tuple[WrittenPath, ...], BeforeValidator(_as_tuple)]
Dtype = Literal["float32", "bfloat16", "float16"]
TextFormat = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "arrow"]
SCHEDULE_NAMES = {
    name.lower(): name
    for name in ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
}
"""Pipeline schedules; their case does not matter."""


def not_yet(default: Any) -> Any:
    """A field that only accepts `default` until its feature is built."""
    return Field(default, json_schema_extra={"not_yet": True})


class Table(BaseModel):
    """Base of all tables: frozen, no unknown keys, no type coercion, no nan or infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )


class Job(Table):
    """What the run is called and where it writes."""

    dump_folder: LocalPath = "./outputs"
    """Run folder: config.toml, metrics.jsonl, tensorboard/, checkpoints/. Relative to the working directory."""
    description: str = "titanling run"
    """Free text, printed at start."""


class Profiling(Table):
    """Traces of torch.profiler."""

    enable_profiling: bool = False
    """Record a Chrome trace of one step every `profile_freq` steps."""
    save_traces_folder: LocalPath = "profile_traces"
    """Folder of the traces, under the run folder."""
    profile_freq: int = Field(10, ge=2)
    """Steps between traces."""
    enable_memory_snapshot: bool = not_yet(False)
    """Dump the CUDA allocator's history."""
    save_memory_snapshot_folder: LocalPath = "memory_snapshot"
    """Folder of the memory snapshots, under the run folder."""


class Metrics(Table):
    """What is reported, how often and where to. metrics.jsonl is always written."""

    log_freq: int = Field(10, ge=1)
    """Steps between log lines. Only logging steps wait for the device."""
    enable_tensorboard: bool = False
    """Write TensorBoard events."""
    disable_color_printing: bool = False
    """Never colour the terminal lines (they are only coloured on a terminal anyway)."""
    save_tb_folder: LocalPath = "tensorboard"
    """Folder of the TensorBoard events, under the run folder."""
    save_for_all_ranks: bool = not_yet(False)
    """Write metrics on every rank instead of rank 0 only."""
    enable_wandb: bool = False
    """Log to Weights & Biases (extra: `wandb`)."""


class Model(Table):
    """A named size, and what to change about it."""

    name: Literal["llama3"] = "llama3"
    """Model family."""
    flavor: Text = "debugmodel"
    """Preset: debugmodel, 1B, 3B, 8B, 70B, 405B, minilingua_30m, … (titanling/model/presets.py lists them)."""
    hf_assets_path: LocalPath | None = None
    """Directory of a Hugging Face tokenizer (tokenizer.json), used to sample, check the data and export."""
    tokenizer_path: LocalPath | None = not_yet(None)
    """torchtitan's deprecated tokenizer.model path; use hf_assets_path."""
    converters: Annotated[tuple[Literal["quantize.linear.float8"], ...], BeforeValidator(_as_tuple)] = ()
    """Model converters; "quantize.linear.float8", or "float8" for short, is the one there is."""
    print_after_conversion: bool = not_yet(False)
    """Print the model after the converters ran."""
    dim: int | None = Field(None, ge=8, le=2**20)
    """Hidden size (preset's if unset)."""
    n_layers: int | None = Field(None, ge=1, le=10_000)
    """Number of transformer blocks (preset's if unset)."""
    n_heads: int | None = Field(None, ge=1, le=2**16)
    """Number of query heads (preset's if unset)."""
    n_kv_heads: int | None = Field(None, ge=1, le=2**16)
    """Number of key/value heads; must divide n_heads (preset's if unset)."""
    head_dim: int | None = Field(None, ge=2, le=2**16)
    """Size of one head, even; dim / n_heads if neither this nor the preset sets it."""
    ffn_dim: int | None = Field(None, ge=1, le=2**24)
    """Width of the SwiGLU feed-forward (preset's if unset)."""
    vocab_size: int | None = Field(None, ge=2, lt=2**31)
    """Rows of the embedding (preset's if unset)."""
    make_vocab_size_divisible_by: int = Field(1, ge=1, le=2**20)
    """Pad vocab_size up to a multiple of this, as Megatron does."""
    rope_theta: float | None = Field(None, gt=0)
    """RoPE base frequency (preset's if unset)."""
    norm_eps: float | None = Field(None, gt=0)
    """RMSNorm epsilon (preset's if unset)."""
    tie_embeddings: bool | None = None
    """Use the embedding as the output matrix (preset's if unset)."""
    qk_norm: bool | None = None
    """RMSNorm on each query and key head before RoPE, as Qwen3 (preset's if unset)."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout after the embedding and on both residual branches of a block (preset's if unset)."""


class Optimizer(Table):
    """AdamW. Weight decay acts on parameters of two or more dimensions only."""

    name: Literal["AdamW"] = "AdamW"
    """Optimizer."""
    lr: float = Field(8e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay."""
    stochastic_rounding: bool = False
    """For training.dtype = "bfloat16": round updated weights up or down by chance, so that steps too small for bfloat16
    count in the mean. The moments are then float32 (10 bytes a parameter instead of 6, without its gradient)."""
    implementation: Literal["fused"] = "fused"
    """torch's fused kernel: the one that can skip a step on the device."""
    early_step_in_backward: bool = not_yet(False)
    """Update each parameter as soon as its gradient is ready."""


class LRScheduler(Table):
    """Linear warm-up, an optional constant part, then decay. A function of the completed steps."""

    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warm-up to the peak."""
    total_steps: int | None = Field(None, ge=1)
    """Length of the schedule; training.steps if unset."""
    decay_ratio: float | None = Field(None, ge=0, le=1)
    """Last fraction of the run that decays (WSD). Unset: decay begins right after warm-up. 0: constant."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: float = Field(0.0, ge=0, le=1)
    """Floor of the decay, as a fraction of the peak."""


class Training(Table):
    """The run's length, batch and precision."""

    dataset: str | None = None
    """torchtitan's name of a streamed data set, c4 or c4_test: becomes a source of kind "hf" where [data] names no
    text."""
    dataset_path: LocalPath | None = None
    """The data set's own name on the Hub, or folder, instead of that of `dataset`."""
    local_batch_size: int = Field(8, ge=1)
    """Sequences in one forward pass on one data-parallel rank."""
    global_batch_size: int = Field(-1, ge=-1)
    """Sequences in one optimizer step over all ranks; the rest is gradient accumulation. -1: local × ranks."""
    seq_len: int = Field(2048, ge=1)
    """Tokens in one sequence."""
    max_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that all tokens have alike (Szegedy 2016). In the training loss, not in validation's."""
    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Factor of (log Σ exp logits)², which keeps logits near 0 (PaLM: 1e-4). In the training loss, not in
    validation's."""
    steps: int = Field(10000, ge=1)
    """Optimizer steps of the whole run. Raise it to extend a finished run."""
    max_skipped_in_a_row: int = Field(100, ge=0)
    """So many steps in a row that update nothing, for they are not finite or have no token to predict, save and end the
    run with exit code 3. 0: it goes on whatever happens."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory (FSDP on CUDA)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which parameters, gradients and optimizer state are held."""
    mixed_precision_param: Dtype = "bfloat16"
    """Type of the compute, to which weights are cast where they are used. float16 adds a loss scaler. Where a CPU
    could only emulate bfloat16 slowly, it computes in float32, and says so."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type of the gradient reduction under FSDP."""
    gc_freq: int = Field(50, ge=1)
    """Steps between Python garbage collections (collecting at the same step on all ranks avoids stragglers)."""

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if self.global_batch_size == 0:
            raise ValueError("global_batch_size = 0: must be positive, or -1 for local_batch_size × ranks")
        if self.global_batch_size > 0 and self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of"
                f" local_batch_size = {self.local_batch_size}"
            )
        if self.dtype == "bfloat16" and self.mixed_precision_param != "bfloat16":
            raise ValueError(
                f'dtype = "bfloat16" with mixed_precision_param = "{self.mixed_precision_param}":'
                ' parameters held in bfloat16 compute in bfloat16; set mixed_precision_param = "bfloat16"'
            )
        return self


class Parallelism(Table):
    """How ranks divide the work."""

    data_parallel_replicate_degree: int = Field(1, ge=1)
    """Copies of the model (DDP; with sharding: HSDP)."""
    data_parallel_shard_degree: int = Field(-1, ge=-1)
    """Ranks that share one copy (FSDP2). -1: all that are left. 1: no sharding."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] | Annotated[int, Field(ge=2)] = "default"
    """Free gathered parameters after each block's forward. default: always, but never under pipeline parallelism,
    where every micro-batch would gather them again. A number: keep them sharded over so many ranks only (of a node)."""
    fsdp_prefetch: int = Field(1, ge=1)
    """Blocks whose parameters FSDP gathers ahead of their use."""
    tensor_parallel_degree: int = Field(1, ge=1)
    """Ranks that share each matrix, and the sequence between matrices (Megatron's sequence parallelism)."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with its matmuls. Needs CUDA and compile."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss under tensor parallelism, instead of a loss over shards of the vocabulary."""
    pipeline_parallel_degree: int = Field(1, ge=1)
    """Ranks that each hold some of the layers."""
    pipeline_parallel_schedule: str = "1F1B"
    """GPipe, 1F1B, LoopedBFS, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV; read only when
    pipeline_parallel_degree > 1."""
    pipeline_parallel_microbatch_size: int = Field(1, ge=1)
    """Sequences in one pipeline micro-batch. Those of all accumulation steps go through one schedule."""
    pipeline_parallel_layers_per_stage: int | None = Field(None, ge=1)
    """Layers of a stage; unset: one stage per rank, two under the schedules that interleave."""
    pipeline_parallel_first_stage_less_layers: int = Field(1, ge=0)
    """How many layers the embedding weighs when layers are divided into stages."""
    pipeline_parallel_last_stage_less_layers: int = Field(1, ge=0)
    """How many layers the output head weighs when layers are divided into stages."""
    context_parallel_degree: int = Field(1, ge=1)
    """Ranks that share each sequence."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How context-parallel ranks exchange keys and values. "alltoall" (ring attention) is not supported."""
    plans: LocalPaths = ()
    """Plans of your own, applied beside ours: "path/to/file.py:ClassName" each (docs/parallelism.md)."""

    @model_validator(mode="after")
    def _check(self) -> "Parallelism":
        if self.pipeline_parallel_schedule.lower() not in SCHEDULE_NAMES:
            raise ValueError(
                f'pipeline_parallel_schedule = "{self.pipeline_parallel_schedule}" is unknown; use one of'
                f" {', '.join(SCHEDULE_NAMES.values())}"
            )
        if self.data_parallel_shard_degree == 0:
            raise ValueError("data_parallel_shard_degree = 0: must be positive, or -1 for all ranks that are left")
        return self


class Checkpoint(Table):
    """Saving and resuming. Needs `enable = true`."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one of this run folder."""
    folder: LocalPath = "checkpoints"
    """Folder of the checkpoints, under the run folder; or a URL that fsspec knows, such as s3://bucket/run (extra:
    `remote`)."""
    interval: int = Field(500, ge=1)
    """Steps between checkpoints. The last step is always saved."""
    interval_minutes: float | None = Field(None, gt=0)
    """Save also when so many minutes have passed since the last save."""
    keep_latest_k: int = Field(10, ge=0)
    """Checkpoints kept; 0 keeps all. At least 2, so that one good one is always left. An old one is deleted only after
    a newer one has been read back from the disk."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are multiples of this are never deleted; 0: none."""
    keep_best: bool = False
    """Save also after a validation that is the best so far, and keep that checkpoint beside the latest ones."""
    load_step: int = Field(-1, ge=-1)
    """Step to resume from; -1: the newest good one."""
    verify: bool = True
    """Compare every file with its hash while loading, each rank its share."""
    fallback: bool = True
    """Go back to the checkpoint before a damaged one, with a warning. false: refuse, and name what is damaged."""
    initial_load_path: LocalPath | None = None
    """Where a run without checkpoints of its own starts from: a step-… folder of another run, or a Hugging Face
    directory of a Llama or Qwen3 model."""
    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path; false: the optimizer, the step and the place in the data too."""
    initial_load_fresh_schedule: bool = False
    """With the optimizer of initial_load_path, begin the steps, the schedule and the data anew."""
    last_save_model_only: bool = False
    """Save only the weights at the last step, as `export_dtype`. Such a run cannot be extended from its end."""
    export_dtype: Dtype = "float32"
    """Type of a weights-only last save."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Save in the background: training waits only until its tensors are copied to CPU memory (pinned: faster, on
    CUDA). Needs room there for this rank's share of the checkpoint."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to find a bad disk early."""

    @model_validator(mode="after")
    def _check(self) -> "Checkpoint":
        if self.keep_latest_k == 1:
            raise ValueError("keep_latest_k = 1 would leave nothing to fall back to; use 2 or more, or 0 to keep all")
        if self.initial_load_fresh_schedule and self.initial_load_model_only:
            raise ValueError(
                "initial_load_fresh_schedule = true takes the optimizer; set initial_load_model_only = false"
                " (weights alone always begin anew)"
            )
        return self


class ActivationCheckpoint(Table):
    """Recomputing activations in the backward pass to save memory."""

    mode: Literal["none", "selective", "full", "memory_budget"] = "none"
    """What is recomputed: nothing; what selective_ac_option says; every block; or what the compiler finds cheapest
    within memory_budget."""
    selective_ac_option: Text = "2"
    """"op": matrix products and attention are kept, all else is recomputed. A number k: every k-th block is recomputed.
    Read only when mode = "selective"."""
    memory_budget: float = Field(0.5, ge=0, le=1)
    """Share of the activations that may be kept: 0 recomputes all, 1 nothing. Read only when mode = "memory_budget"."""

    @model_validator(mode="after")
    def _check(self) -> "ActivationCheckpoint":
        option = self.selective_ac_option
        if option != "op" and not (option.isdecimal() and int(option) > 0):
            raise ValueError(f'selective_ac_option = "{option}": must be "op" or a positive number, as in "2"')
        return self


class Compile(Table):
    """torch.compile."""

    enable: bool = False
    """Compile."""
    components: Annotated[
        tuple[Literal["model", "loss"], ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
    ] = ("model", "loss")
    """"model": each transformer block. "loss" is torchtitan's; ours gains nothing from it."""
    backend: Text = "inductor"
    """Compiler backend."""
    cache_dir: LocalPath | None = None
    """Folder of the compiled code, kept for the next start; torch's own choice if unset."""


Implementation = Literal["auto", "triton", "torch"]


class Kernels(Table):
    """What computes the operations that there are kernels for."""

    implementation: Implementation = "auto"
    """For all that have no key of their own. "auto": Triton on NVIDIA GPUs from sm_80 on and on AMD gfx90a and gfx942,
    torch elsewhere; the start of a run says which it is."""
    rms_norm: Implementation | None = None
    """For the norms before attention and the head, and those of queries and keys."""
    add_rms_norm: Implementation | None = None
    """For the sum after attention and its norm, in one pass."""
    swiglu: Implementation | None = None
    """For the feed-forward's activation."""
    rope: Implementation | None = None
    """For the rotation of queries and keys."""
    linear_cross_entropy: Implementation | None = None
    """For the loss, but for its matrix products, which are torch's: a chunk of logits at a time."""


class Float8(Table):
    """float8 linear layers; read only when model.converters names quantize.linear.float8."""

    enable_fsdp_float8_all_gather: bool = False
    """torchtitan gathers sharded weights in float8; here they are gathered as mixed_precision_param says, and this has
    no effect."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """The scales of weights that are gathered in float8, in one reduction; no effect here either."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Scaling recipe."""
    filter_fqns: Strings = ()
    """Modules that stay in bfloat16."""


class QuantizeLinear(Table):
    """Quantized linear layers."""

    float8: Float8 = Float8()
    """[quantize.linear.float8]"""


class Quantize(Table):
    """Quantized training."""

    linear: QuantizeLinear = QuantizeLinear()
    """[quantize.linear]"""


class Comm(Table):
    """Collective communication."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: NCCL (on ROCm, RCCL) for GPU tensors, gloo for CPU tensors."""
    init_timeout_seconds: int = Field(300, ge=1, le=31_536_000)
    """How long a collective may wait for other ranks; at start-up, how long preparing data may take."""
    train_timeout_seconds: int = Field(100, ge=1, le=31_536_000)
    """How long a collective may wait for other ranks after the first step. Then the run ends and names who is lost."""


class Validation(Table):
    """Loss on held-out text, on the same sequences at any world size."""

    enable: bool = False
    """Validate every `freq` steps and after the last one."""
    dataset: str | None = None
    """torchtitan's name of a streamed dataset. Streaming is not supported yet: data.validation is used instead."""
    dataset_path: LocalPath | None = not_yet(None)
    """torchtitan's path of a streamed dataset. Use data.validation here."""
    local_batch_size: int = Field(8, ge=1)
    """Sequences in one forward pass on one rank."""
    seq_len: int | None = Field(None, ge=1)
    """Tokens in one validation sequence; training.seq_len if unset."""
    freq: int = Field(10, ge=1)
    """Steps between validations."""
    steps: int = Field(-1, ge=-1)
    """Size of the validation set in batches of local_batch_size, over all ranks. -1: all of data.validation."""

    @model_validator(mode="after")
    def _check(self) -> "Validation":
        if self.steps == 0:
            raise ValueError("steps = 0 validates nothing; set enable = false, a positive number, or -1 for all")
        return self


class Debug(Table):
    """Seeds and determinism."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the data order and dropout."""
    deterministic: bool = False
    """Use only deterministic kernels, even where slower. A CPU run is deterministic without it."""


Needs = Literal["text", "hashes", "tokens"]
"""What a filter works on: one document's text alone, also what came before it, or also the number of its tokens."""
Share = Annotated[float, Field(ge=0, le=1)]
NGrams = Annotated[
    tuple[Annotated[tuple[Annotated[int, Field(ge=1, le=32)], Share], BeforeValidator(_as_tuple)], ...],
    BeforeValidator(_as_tuple),
]


class LengthFilter(Table):
    """Drops documents that are too short or too long."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["length"]
    """This filter."""
    min_characters: int | None = Field(None, ge=1)
    """Least length in characters."""
    max_characters: int | None = Field(None, ge=1)
    """Greatest length in characters."""
    min_words: int | None = Field(None, ge=1)
    """Least length in words. Here and below words are what white space separates, if nothing else is said."""
    max_words: int | None = Field(None, ge=1)
    """Greatest length in words."""

    @model_validator(mode="after")
    def _check(self) -> "LengthFilter":
        if not self.model_fields_set & {"min_characters", "max_characters", "min_words", "max_words"}:
            raise ValueError("min_characters, max_characters, min_words, max_words: none is set; set one, or drop this")
        for unit in ("characters", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} = {low} is above max_{unit} = {high}; every document would be dropped")
        return self


class LanguageFilter(Table):
    """Drops documents that are not in the language of their source, as far as a library can tell."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["language"]
    """This filter."""
    min_score: float = Field(0.65, gt=0, le=1)
    """Least probability of the language."""
    library: Literal["py3langid", "lingua", "fasttext"] = "py3langid"
    """What tells it (each an extra of its name): py3langid, small and offline; lingua, slower and better on short
    texts; fasttext, with a model that you give."""
    model: WrittenPath | None = None
    """fasttext's model, such as lid.176.bin or GlotLID's."""
    characters: int = Field(2000, ge=1)
    """How much of a document's beginning is looked at."""

    @model_validator(mode="after")
    def _check(self) -> "LanguageFilter":
        if (self.library == "fasttext") != (self.model is not None):
            raise ValueError('model belongs to library = "fasttext", which needs one; set both or neither')
        return self


class BadWordsFilter(Table):
    """Drops documents with several words or phrases of a list."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["bad_words"]
    """This filter."""
    path: WrittenPath
    """List in UTF-8, one word or phrase a line, # begins a comment; "{language}" stands for the source's language."""
    hits: int = Field(5, ge=1)
    """Drop a document in which so many places match. Case does not matter, and only whole words match."""


class SymbolLinesFilter(Table):
    """Takes out lines that are mostly symbols; a document of which nothing is left is dropped."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["symbol_lines"]
    """This filter."""
    max_symbols: float = Field(0.5, ge=0, lt=1)
    """Greatest share of symbols (neither letter nor digit) among a line's characters without white space."""


class GopherQualityFilter(Table):
    """Drops documents by the quality rules of Gopher (Rae et al. 2021, appendix A.1.1)."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["gopher_quality"]
    """This filter."""
    min_words: int = Field(50, ge=0)
    """Least number of words."""
    max_words: int = Field(100_000, ge=1)
    """Greatest number of words."""
    min_mean_word_length: float = Field(3.0, ge=0)
    """Least mean length of a word in characters."""
    max_mean_word_length: float = Field(10.0, gt=0)
    """Greatest mean length of a word in characters."""
    max_symbol_ratio: float = Field(0.1, ge=0)
    """Greatest number of # per word, and of ellipses per word."""
    max_bullet_lines: float = Field(0.9, ge=0, le=1)
    """Greatest share of lines that begin with a bullet or a dash."""
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1)
    """Greatest share of lines that end with an ellipsis."""
    min_alphabetic_words: float = Field(0.8, ge=0, le=1)
    """Least share of words with a letter."""
    min_stop_words: int = Field(2, ge=0)
    """Least number of different stop words; 0: do not look for them."""
    stop_words: WrittenPath | None = None
    """List of them, as bad_words.path. Unset: Gopher's eight English ones, which serve no other language."""

    @model_validator(mode="after")
    def _check(self) -> "GopherQualityFilter":
        for low, high in (("min_words", "max_words"), ("min_mean_word_length", "max_mean_word_length")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} = {getattr(self, low)} is above {high} = {getattr(self, high)}; lower it")
        return self


class GopherRepetitionFilter(Table):
    """Drops documents that repeat themselves (Rae et al. 2021, table A1). A repeated line, paragraph or n-gram is one
    that has been seen in the document before; characters are counted once, without white space."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["gopher_repetition"]
    """This filter."""
    max_lines: float = Field(0.3, ge=0, le=1)
    """Greatest share of repeated lines."""
    max_paragraphs: float = Field(0.3, ge=0, le=1)
    """Greatest share of repeated paragraphs, which blank lines separate."""
    max_line_characters: float = Field(0.2, ge=0, le=1)
    """Greatest share of characters in repeated lines."""
    max_paragraph_characters: float = Field(0.2, ge=0, le=1)
    """Greatest share of characters in repeated paragraphs."""
    top_n_grams: NGrams = ((2, 0.2), (3, 0.18), (4, 0.16))
    """[n, share]: greatest share of characters in the places of that n-gram of words which covers most of them; only
    n-grams that come more than once."""
    repeated_n_grams: NGrams = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    """[n, share]: greatest share of characters in repeated n-grams of words."""


class FixTextFilter(Table):
    """Repairs text that was decoded wrongly (mojibake), by ftfy (extra: `ftfy`). Quotes, ligatures and HTML stay."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["fix_text"]
    """This filter."""
    normalization: Literal["none", "NFC", "NFKC"] = "NFC"
    """Unicode normal form of the result."""


class DeduplicateDocumentsFilter(Table):
    """Drops documents whose text has come before, to the letter."""

    needs: ClassVar[Needs] = "hashes"
    kind: Literal["deduplicate_documents"]
    """This filter."""


class DeduplicateParagraphsFilter(Table):
    """Takes out paragraphs that have come before, in this document or another; drops a document that has none left."""

    needs: ClassVar[Needs] = "hashes"
    kind: Literal["deduplicate_paragraphs"]
    """This filter."""
    separator: Text = "\n\n"
    """What stands between paragraphs; a line break for web text of one paragraph a line."""
    min_characters: int = Field(1, ge=1)
    """Shorter paragraphs stay. White space at a paragraph's ends never counts."""


class TokenWordRatioFilter(Table):
    """Drops documents that need many tokens for a word (or few): text that is broken, or in another language. The
    tokens are those of the run's tokenizer, so such filters stand last."""

    needs: ClassVar[Needs] = "tokens"
    kind: Literal["token_word_ratio"]
    """This filter."""
    max_ratio: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Language → greatest number of tokens per word; "*" stands for all that are not named."""
    min_ratio: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Language → least number of tokens per word; "*" as above. Not named: no limit."""

    @model_validator(mode="after")
    def _check(self) -> "TokenWordRatioFilter":
        for language, low in self.min_ratio.items():
            high = self.max_ratio.get(language, self.max_ratio.get("*"))
            if high is not None and low > high:
                raise ValueError(f"min_ratio of {language} = {low} is above its max_ratio = {high}; lower it")
        return self


class DecontaminateFilter(Table):
    """Drops documents that contain a text of a test set: containment of n-grams of words, without case and
    punctuation."""

    needs: ClassVar[Needs] = "text"
    kind: Literal["decontaminate"]
    """This filter."""
    test_sets: WrittenPaths = Field(min_length=1)
    """Files or globs: plain text, where each line is a test text, or JSON, where each string is; also packed."""
    n: int = Field(13, ge=2, le=64)
    """Words of an n-gram. A shorter test text is looked for as a whole."""
    min_containment: float = Field(0.8, gt=0, le=1)
    """Drop a document that holds at least this share of the n-grams of a test text."""
    min_words: int = Field(8, ge=2)
    """Shorter test texts are not looked for: they stand in many a document by chance."""


Filter = Annotated[
    LengthFilter
    | LanguageFilter
    | BadWordsFilter
    | SymbolLinesFilter
    | GopherQualityFilter
    | GopherRepetitionFilter
    | FixTextFilter
    | DeduplicateDocumentsFilter
    | DeduplicateParagraphsFilter
    | TokenWordRatioFilter
    | DecontaminateFilter,
    Field(discriminator="kind"),
]
"""What may be done to documents before they are tokenised."""


class Prepare(Table):
    """Makes the tokenizer and the token files from text when they do not exist yet."""

    text: WrittenPaths = ()
    """Files, folders or globs, or "python-stdlib"; each also as NAME=PATH. JSON, CSV, Parquet and Arrow hold a document
    a row, plain text is a document a file, in UTF-8; gz, bz2, xz and zst are unpacked. Empty: prepare nothing."""
    format: TextFormat = "auto"
    """What all files of text are. "auto": what each one's content shows, and its suffix where that leaves it open."""
    text_field: Text = "text"
    """JSON, CSV, Parquet, Arrow: key or column of the text; a.b is b within a."""
    id_field: Text | None = None
    """JSON, CSV, Parquet, Arrow: key or column of the documents' names, strings or whole numbers; kept beside the token
    files for scripts/data.py and trace_data.py. Of plain text the path is the name. Unset: documents have numbers
    only."""
    document_separator: Text | None = None
    """Plain text: what stands between documents, as "<|endoftext|>" or "\\n\\n"; line breaks beside it are dropped.
    Unset: a file is a document."""
    max_document_bytes: int = Field(100_000_000, ge=1, le=1_000_000_000)
    """Refuse a document above this, as text that misses its line ends."""
    skip_bad: bool = False
    """Count documents that cannot be used and leave them out, instead of refusing them."""
    vocab_size: int = Field(8192, ge=258, le=2**24)
    """Size of the byte-level BPE vocabulary that is trained; unused if model.hf_assets_path has a tokenizer already."""
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of the documents, chosen by hash of their text, kept for validation. If none would be, or all, it is the
    last tokens of all documents. 0: none are, for a run without data.validation."""
    add_bos: bool = False
    """Begin each document with the tokenizer's bos_token. Generation and export do the same then, and streamed sources
    too. All files of a run must be alike in it."""
    backend: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """What encodes the text. "auto": gigatoken, many times faster, if it is installed (extra: `gigatoken`) and gives
    the ids of tokenizers on a sample of the text; else tokenizers. The files are the same."""
    workers: int | None = Field(None, ge=1, le=4096)
    """Processes that prepare. Unset: one for each core, and no more than the text has pieces of 64 MB. The files are
    the same."""
    language: Text | None = None
    """Language of the text, for filters. Unset: of NAME=PATH, the NAME."""
    filters: Annotated[tuple[Filter, ...], BeforeValidator(_as_tuple)] = ()
    """[[data.prepare.filters]], applied to each document in the order given"""


class Source(Table):
    """A source of several that training reads, in proportion to their weights."""

    name: Text
    """What the stages, the messages and the order of its samples call it. Files may move; a name may not change."""
    kind: Literal["tokens", "files", "jsonl", "parquet", "hf"] = "tokens"
    """"tokens": token files. The others are streamed, tokenised by model.hf_assets_path while training reads them:
    files in any format that preparation reads, only JSON ("jsonl"), only Parquet, or what Hugging Face `datasets`
    streams (extra: `datasets`)."""
    paths: LocalPaths = Field(min_length=1)
    """Prefixes of token files, as data.train is, or globs of them: ["web/en-*"]. Of "files", "jsonl" and "parquet",
    files or globs; of "hf", one name on the Hub or folder."""
    format: TextFormat = "auto"
    """Of kind "files": as data.prepare.format."""
    document_separator: Text | None = None
    """Of kind "files": as data.prepare.document_separator."""
    subset: Text | None = None
    """Name of the configuration of a data set of kind "hf", such as a language."""
    split: Text = "train"
    """Split of a data set of kind "hf"."""
    text_field: Text = "text"
    """Field or column of the text in streamed files."""
    weight: float | None = Field(None, gt=0)
    """Share of the sequences, in proportion to the others. Unset: read only in stages that name it."""
    max_epochs: float | None = Field(None, gt=0)
    """Refuse a run that would read it more often than this. Unset: say so beyond 4. How much a streamed source holds is
    not known at start: the run ends with an error where it is over."""

    @model_validator(mode="after")
    def _check(self) -> "Source":
        if self.kind != "tokens" and self.max_epochs is not None and not self.max_epochs.is_integer():
            raise ValueError(f"max_epochs = {self.max_epochs:g}: must be a whole number for a streamed source")
        for key, unset in (("format", "auto"), ("document_separator", None)):
            if self.kind != "files" and getattr(self, key) != unset:
                raise ValueError(f'{key} is of kind "files", and this source is of kind "{self.kind}": unset it')
        if self.kind == "hf" and len(self.paths) > 1:
            raise ValueError('paths of kind "hf" is one name or folder; make each a source of its own')
        return self


class Stage(Table):
    """From a step on, other weights or shorter sequences. Sources go on where they are; what is not set stays so."""

    from_step: int | None = Field(None, ge=0)
    """Steps before it; 0: from the beginning, instead of the sources' own weights. Needs training.global_batch_size
    wherever the number of processes may change."""
    from_tokens: int | None = Field(None, ge=1)
    """Tokens before it, rounded up to whole sequences; instead of from_step."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Name of a source → weight. Sources that it leaves out are not read in this stage."""
    seq_len: int | None = Field(None, ge=1)
    """Tokens that see each other. Divides training.seq_len, the longest: every sequence of a step is cut into rows of
    so many tokens, and a step has as many tokens as before. At first training.seq_len."""

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        if (self.from_step is None) == (self.from_tokens is None):
            raise ValueError("from_step or from_tokens must say where a stage begins, and not both")
        if not self.weights and self.seq_len is None:
            raise ValueError("weights or seq_len must say what a stage changes")
        return self


class Data(Table):
    """Tokenised text: Megatron .bin/.idx files with a sidecar .json, named by their common prefix."""

    train: LocalPath | None = None
    """Prefix of the training files: data/mine/train stands for data/mine/train.bin, .idx and .json. Or a .ds of
    datatrove's, or a .npy of OLMo's."""
    validation: LocalPath | None = None
    """Prefix of the validation files."""
    root: LocalPath | None = None
    """Folder that relative paths of the sources start from; the working directory if unset."""
    sources: Annotated[tuple[Source, ...], BeforeValidator(_as_tuple)] = ()
    """[[data.sources]], instead of data.train"""
    stages: Annotated[tuple[Stage, ...], BeforeValidator(_as_tuple)] = ()
    """[[data.stages]]"""
    workers: int = Field(0, ge=0, le=1024)
    """Processes of each rank that read and tokenise streamed sources. 0: a thread. A run that goes on needs as many."""
    shuffle_buffer: int = Field(10_000, ge=1)
    """Documents of a streamed source that are held and shuffled together, by each worker. 1: as they come."""
    eod_id: int | None = Field(None, ge=0)
    """Id of the token that ends a document. Needed only where token files do not say, which are those of others: .ds,
    .npy, and .bin/.idx without a .json."""
    bos_id: int | None = Field(None, ge=0)
    """Id of the token that begins each document, for the token files of others. Unset: the tokenizer's bos_token, if
    samples of the documents begin with it; else none."""
    npy_dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the tokens in .npy files that have no header."""
    document_mask: Literal["none", "causal"] = "none"
    """Documents that share a sequence: "none" lets tokens see those before them. "causal" treats each as if it were
    alone, also in validation: attention stays within it, positions restart with it, and its end-of-document token has
    no label, which would be the next one's first token. (Megatron's --reset-attention-mask, --reset-position-ids and
    --eod-mask-loss in one; torchtitan keeps that label.)"""
    packing: Literal["concat", "best_fit"] = "concat"
    """How training sequences are made. "concat": the stream of tokens is cut every seq_len tokens. "best_fit":
    documents are cut where they are longer than seq_len, and put together so that sequences are full; a few are cut to
    fill them. With document_mask = "causal", each part is a document of its own."""
    packing_window: int = Field(256, ge=16, le=2**24)
    """Sequences that are packed together by best_fit, at least. Padding stays below 1 / packing_window."""
    audit_log: bool = False
    """Write what each step reads, document by document, to <run folder>/data/steps-rankNNN.jsonl, a file of each
    data-parallel rank. scripts/trace_data.py finds the same without it."""
    prepare: Prepare = Prepare()
    """[data.prepare]"""

    @property
    def streams(self) -> bool:
        """Whether its sources are tokenised while training reads them."""
        return any(source.kind != "tokens" for source in self.sources)

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.train is not None and self.sources:
            raise ValueError("train is one source, and data.sources are others; keep one of the two")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'sources has two named "{name}"; give each its own name')
        if len(names) > 1 and all(source.weight is None for source in self.sources):
            raise ValueError("sources has no weight at all; give those one that are read from the beginning")
        if self.streams and any(source.kind == "tokens" for source in self.sources):
            raise ValueError(
                'sources has some of kind "tokens" and some that are streamed; a run reads one or the other:'
                " prepare the streamed ones (scripts/prepare_data.py)"
            )
        for key, asked in (("packing", self.packing != "concat"), ("audit_log", self.audit_log)):
            if self.streams and asked:
                raise ValueError(f"{key} is for token files, and sources has streamed ones: prepare them, or unset it")
        for stage in self.stages:
            for name in stage.weights:
                if name not in names:
                    raise ValueError(f'stages gives a weight to "{name}", which no [[data.sources]] is named')
        for kind in ("from_step", "from_tokens"):
            starts = [start for stage in self.stages if (start := getattr(stage, kind)) is not None]
            if starts != sorted(set(starts)):
                raise ValueError(f"stages must stand in order, but their {kind} are {starts}")
        return self


class Sampling(Table):
    """Text written by the model while it trains."""

    freq: int = Field(0, ge=0)
    """Steps between samples; 0: never. Needs model.hf_assets_path."""
    prompts: Strings = ("def ",)
    """One continuation is printed for each."""
    max_new_tokens: int = Field(48, ge=1)
    """Length of a continuation in tokens."""
    temperature: float = Field(0.8, ge=0)
    """Softmax temperature; 0: greedy."""


class Config(Table):
    """A whole run."""

    job: Job = Job()
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    compile: Compile = Compile()
    kernels: Kernels = Kernels()
    quantize: Quantize = Quantize()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    sampling: Sampling = Sampling()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    comm: Comm = Comm()
    debug: Debug = Debug()
