"""The configs of train_configs/ are the runs they are named after: derived numbers against the published ones."""

from fractions import Fraction
from typing import NamedTuple

import pytest
from helpers import ROOT

from titanling.config import Config, load_config
from titanling.config.check import check_runnable
from titanling.data.mixture import whole_weights
from titanling.metrics.hardware import flops_per_token
from titanling.model.presets import LlamaShape, resolve_shape
from titanling.parallel.degrees import accumulation_steps
from titanling.schedule import lr_factor

# Per cent of each stage: the kinds of text, and the languages in each of web and high quality.
KINDS = ({"web": 85, "hq": 10, "code": 5}, {"web": 60, "hq": 30, "code": 10})
LANGUAGES = (
    dict(en=27, de=18, es=14, fr=13, it=7, pt=7, nl=4, pl=4, cs=2, el=1, fi=1, sv=1, bg=1),
    dict(en=20, de=14, es=12, fr=12, it=7, pt=7, nl=5, pl=5, cs=4, bg=4, fi=4, el=3, sv=3),
)


class Run(NamedTuple):
    """What is known of a run."""

    devices: int
    total: int
    """Parameters."""
    non_embedding: int
    batch: int
    """Tokens of a step."""
    tokens: int
    """Of the whole run."""
    peak: float
    last: float
    """Learning rate after the last step."""
    warmup: int
    weight_decay: float


MINILINGUA = {"peak": 2.5e-3, "weight_decay": 0.01}
LLAMMLEIN = {"batch": 2**21, "tokens": 1_430_512 * 2**21, "peak": 2.5e-4, "last": 4e-6, "warmup": 2000}
RUNS = {
    "minilingua_1b": Run(
        256, 1_304_004_096, 1_107_396_096, 2_097_152, 1_499_463_680_000, last=0, warmup=6000, **MINILINGUA
    ),
    "minilingua_30m": Run(8, 75_703_680, 26_551_680, 2**19, 17_480 * 2**19, last=2.5e-3, warmup=175, **MINILINGUA),
    "minilingua_60m": Run(8, 128_467_456, 62_931_456, 2**20, 17_660 * 2**20, last=2.5e-3, warmup=177, **MINILINGUA),
    "minilingua_100m": Run(8, 192_535_680, 110_615_680, 2**20, 35_808 * 2**20, last=2.5e-3, warmup=358, **MINILINGUA),
    "llammlein_120m": Run(64, 124_766_976, 75_516_672, weight_decay=0.1, **LLAMMLEIN),
    "llammlein_1b": Run(64, 1_100_310_528, 968_976_384, weight_decay=0.1, **LLAMMLEIN),
    "llammlein_7b": Run(64, 6_738_939_904, 6_476_271_616, weight_decay=0.1, **LLAMMLEIN),
    "dense_180m": Run(1, 226_546_432, 201_380_608, 131_072, 3_932_160_000, 3e-3, 3e-4, 2000, 0.1),
    "custom_300m": Run(4, 454_166_528, 402_703_360, 512 * 2048, 104_857_600_000, 6e-4, 6e-5, 2000, 0.1),
}


def load(name: str) -> Config:
    return load_config(ROOT / f"train_configs/{name}.toml").config


def rate(config: Config, completed: int) -> float:
    return config.optimizer.lr * lr_factor(config.lr_scheduler, config.training.steps, completed)


def full_flops(shape: LlamaShape, seq_len: int) -> float:
    with_head = shape.matmul_params + shape.embedding_params
    return flops_per_token(with_head, shape.n_layers, shape.n_heads, shape.head_dim, seq_len).full


def test_each_config_is_known_here() -> None:
    assert {path.stem for path in (ROOT / "train_configs").glob("*.toml")} == {*RUNS, "debug"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_numbers_of_its_system(name: str) -> None:
    config, run = load(name), RUNS[name]
    check_runnable(config)
    shape, training = resolve_shape(config.model), config.training
    assert (shape.total_params, shape.non_embedding_params) == (run.total, run.non_embedding)
    assert training.seq_len == 2048 and training.global_batch_size * training.seq_len == run.batch
    assert run.batch * training.steps == run.tokens
    assert accumulation_steps(training, run.devices) * training.local_batch_size * run.devices == run.batch // 2048
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, training.max_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert optimizer.weight_decay == run.weight_decay
    assert rate(config, run.warmup - 2) < rate(config, run.warmup - 1) == optimizer.lr == run.peak
    assert rate(config, training.steps) == pytest.approx(run.last, rel=1e-12)
    assert config.model.hf_assets_path and config.data.validation


def test_what_only_one_of_them_has() -> None:
    assert load("llammlein_1b").debug.seed == 3407 and load("llammlein_7b").activation_checkpoint.mode == "full"
    dense, custom = load("dense_180m"), load("custom_300m")
    assert resolve_shape(dense.model).qk_norm and accumulation_steps(dense.training, 1) == 4
    assert (dense.validation.freq, dense.validation.steps, dense.checkpoint.interval) == (500, 50, 5000)
    assert resolve_shape(custom.model).dropout == 0.1 and custom.training.mixed_precision_param == "float16"
    assert (custom.metrics.log_freq, custom.validation.freq, custom.checkpoint.keep_best) == (100, 1000, True)
    shape = resolve_shape(load("minilingua_1b").model)
    assert shape.rope_theta == 10_000 and shape.rope_scaling is None and shape.tie_embeddings


def test_minilingua_decays_with_its_second_stage() -> None:
    config = load("minilingua_1b")
    (stage,) = config.data.stages
    assert stage.from_step == 643_500 and config.training.local_batch_size == 4
    peak = config.optimizer.lr
    assert rate(config, 643_500) == peak > rate(config, 643_501)
    assert rate(config, 643_500 + 71_500 // 2) == pytest.approx(peak / 2)
    assert rate(config, 715_000 - 1) == pytest.approx(peak / 71_500)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("minilingua")])
def test_minilingua_has_the_shares_of_both_stages(name: str) -> None:
    data = load(name).data
    assert data.train is None and len(data.sources) == 27
    first = {source.name: source.weight or 0.0 for source in data.sources}
    for weights, kinds, languages in zip((first, data.stages[0].weights), KINDS, LANGUAGES, strict=True):
        assert sum(languages.values()) == sum(kinds.values()) == 100
        expected = {
            f"{kind}-{language}": Fraction(kinds[kind] * share, 10_000)
            for kind in ("web", "hq")
            for language, share in languages.items()
        } | {"code": Fraction(kinds["code"], 100)}
        whole = whole_weights(list(weights.values()))
        assert {key: Fraction(weight, sum(whole)) for key, weight in zip(weights, whole, strict=True)} == expected


@pytest.mark.parametrize(("size", "budget"), [("30m", 5.2e18), ("60m", 1.8e19), ("100m", 5.4e19)])
def test_the_grid_spends_its_budget(size: str, budget: float) -> None:
    config = load(f"minilingua_{size}")
    training = config.training
    a_step = full_flops(resolve_shape(config.model), training.seq_len) * training.global_batch_size * training.seq_len
    assert abs(training.steps * a_step - budget) <= a_step / 2
    assert config.lr_scheduler.warmup_steps == round(training.steps / 100)
    assert rate(config, training.steps // 2) == rate(config, training.steps - 1) == 2.5e-3
    assert (config.validation.freq, config.validation.steps) == (4000, 32)
