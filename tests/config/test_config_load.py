"""Files: reading, extends, strict types, bounds, unknown names, the resolved config."""

import json
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import tomli_w
from hypothesis import assume, given
from hypothesis import strategies as st

from titanling.config.load import dump_toml, is_kind, is_repeated, known_tables, load_config
from titanling.config.schema import Config
from titanling.errors import UserError

KEYS = {
    f"{table}.{key}": field
    for table, fields in known_tables().items()
    for key, field in fields.model_fields.items()
    if f"{table}.{key}" not in known_tables() and not (key == "kind" and is_kind(table))
}
BOUNDS = ("ge", "gt", "le", "lt")


def write(folder: Path, name: str, text: str) -> Path:
    """A TOML file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> str:
    """The one line with which loading fails."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "a.toml", "")).config == Config()


def test_values_arrive_with_their_types(tmp_path: Path) -> None:
    text = '[training]\nsteps = 3\nmax_norm = 2\n[optimizer]\nlr = 1e-3\n[data.prepare]\ntext = ["a", "b"]\n'
    config = load_config(write(tmp_path, "a.toml", text)).config
    assert (config.training.steps, config.training.max_norm, config.optimizer.lr) == (3, 2.0, 1e-3)
    assert config.data.prepare.text == ("a", "b")


def test_the_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.toml", "")).config
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def test_extends_one_file_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, "base/deep.toml", "[training]\nsteps = 1\nseq_len = 64\nlocal_batch_size = 4\n")
    write(tmp_path, "base/mid.toml", 'extends = "deep.toml"\n[training]\nsteps = 2\n')
    top = write(tmp_path, "runs/top.toml", 'extends = "../base/mid.toml"\n[training]\nlocal_batch_size = 5\n')
    training = load_config(top).config.training
    assert (training.steps, training.seq_len, training.local_batch_size) == (2, 64, 5)


def test_extends_a_list_later_wins_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", "[training]\nsteps = 1\nseq_len = 10\n[data.prepare]\nvocab_size = 300\n")
    write(tmp_path, "b.toml", '[training]\nsteps = 2\n[data]\ntrain = "x"\n')
    config = load_config(write(tmp_path, "c.toml", 'extends = ["a.toml", "b.toml"]\n')).config
    assert (config.training.steps, config.training.seq_len) == (2, 10)
    assert (config.data.train, config.data.prepare.vocab_size) == ("x", 300)


def test_two_files_may_extend_the_same_one(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[training]\nsteps = 1\n")
    for name in ("a", "b"):
        write(tmp_path, f"{name}.toml", 'extends = "base.toml"\n')
    assert load_config(write(tmp_path, "c.toml", 'extends = ["a.toml", "b.toml"]\n')).config.training.steps == 1


def test_overrides_win_over_all_files(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "[training]\nsteps = 1\n")
    loaded = load_config(path, {"training.steps": 7, "data.prepare.vocab_size": 400})
    assert (loaded.config.training.steps, loaded.config.data.prepare.vocab_size) == (7, 400)
    assert loaded.where("training.steps") == "command line"
    assert loaded.where("training.seq_len") == str(path)


@pytest.mark.parametrize("extends", ['"a.toml"', '["b.toml", "a.toml"]', '"link/../a.toml"'])
def test_extends_in_a_circle(tmp_path: Path, extends: str) -> None:
    write(tmp_path, "link/x", "")
    write(tmp_path, "b.toml", "")
    message = refusal(write(tmp_path, "a.toml", f"extends = {extends}\n"))
    assert "a.toml: extends goes in a circle" in message and "remove one" in message


def test_a_longer_circle_names_the_file_that_closes_it(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        write(tmp_path, f"{name}.toml", f'extends = "{base}.toml"\n')
    message = refusal(tmp_path / "a.toml")
    assert message.startswith(f"{tmp_path / 'c.toml'}: extends goes in a circle")
    assert "a.toml" not in message


@pytest.mark.parametrize("extends", ["3", "[1]", "{}", '[""]', "true"])
def test_extends_of_a_wrong_type(tmp_path: Path, extends: str) -> None:
    message = refusal(write(tmp_path, "a.toml", f"extends = {extends}\n"))
    assert "a.toml: extends = " in message and "must be a file name or a list of file names" in message


def test_an_error_names_the_file_that_set_the_key(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[training]\nsteps = 0\n")
    top = write(tmp_path, "top.toml", 'extends = "base.toml"\n[training]\nseq_len = 8\n')
    assert refusal(top) == f"{tmp_path / 'base.toml'}: training.steps = 0: must be at least 1"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.toml", None, "no such config file"),
        ("broken.toml", b"[training\nsteps = 3\n", "not valid TOML"),
        ("broken.toml", b"[training]\nsteps = \n", "at line 2"),
        ("twice.toml", b"[training]\nsteps = 1\nsteps = 2\n", "not valid TOML"),
        ("latin.toml", b"[job]\ndescription = '\xe9'\n", "cannot read"),
    ],
)
def test_a_missing_or_malformed_file(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ") and says in message
    extending = write(tmp_path, "top.toml", f'extends = "{name}"\n')
    message = refusal(extending)
    assert message.startswith(f"{tmp_path / name}: ") and says in message


def test_a_missing_base_names_the_file_that_extends_it(tmp_path: Path) -> None:
    assert f"extended by {tmp_path / 'a.toml'}" in refusal(write(tmp_path, "a.toml", 'extends = "no.toml"\n'))


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    assert "cannot read this config file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[trainning]\nsteps = 1\n", "unknown table [trainning]; did you mean training?"),
        ("[training]\nstep = 1\n", "unknown key step in [training]; did you mean steps?"),
        ("[training]\nzzzzzz = 1\n", "unknown key zzzzzz in [training]; remove it (--help lists all keys)"),
        ("[data.preparation]\ntext = []\n", "unknown key preparation in [data]; did you mean prepare?"),
        ("[data.prepare]\nvocab = 9\n", "unknown key vocab in [data.prepare]; did you mean vocab_size?"),
        ("steps = 1\n", "steps stands outside of any table; it belongs under [training]"),
        ("[quantize.linear.float9]\n", "unknown key float9 in [quantize.linear]; did you mean float8?"),
        ("training = 3\n", "training = 3: must be a table, [training]"),
        ("[[training]]\nsteps = 1\n", "must be a table, [training]"),
    ],
)
def test_unknown_names_get_the_nearest_known_one(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(write(tmp_path, "a.toml", text))
    assert message.startswith(f"{tmp_path / 'a.toml'}: ") and says in message


def test_the_unknown_name_is_said_first_and_the_rest_counted(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.toml", '[training]\nsteps = "3"\nseqlen = 8\n'))
    assert "unknown key seqlen in [training]; did you mean seq_len? (and 1 more)" in message


def annotation_of(dotted: str) -> Any:
    """A key's type without `| None`."""
    annotation = KEYS[dotted].annotation
    inner = [a for a in get_args(annotation) if a is not type(None)]
    return inner[0] if type(None) in get_args(annotation) else annotation


NEEDED = {
    "bad_words": {"path": "a"},
    "decontaminate": {"test_sets": ["a"]},
    "token_word_ratio": {"max_ratio": {"*": 2}},
}


def override(dotted: str, value: Any) -> dict[str, Any]:
    """What sets one key, and in a table that may come several times what else it needs."""
    table, _, key = dotted.rpartition(".")
    if is_kind(table):
        outer, _, kind = table.rpartition(".")
        return {outer: [NEEDED.get(kind, {}) | {"kind": kind, key: value}]}
    needed = {"data.sources": {"name": "a", "paths": ["a"]}, "data.stages": {"from_step": 1, "weights": {"a": 1}}}
    return {table: [needed[table] | {key: value}]} if is_repeated(table) else {dotted: value}


def wrong_values(dotted: str) -> list[Any]:
    """Values that TOML can express and the key's type must refuse; among them those that a lax parser would convert."""
    annotation = annotation_of(dotted)
    if annotation is bool:
        return ["true", 1, 0.0, []]
    if annotation is int:
        return ["3", 2.0, 2.5, True, [3]]
    if annotation is float:
        return ["1e-3", True, [1.0], float("inf"), float("nan")]
    if get_origin(annotation) is tuple:
        return ["a", 3, [3], {"a": 1}]
    if get_origin(annotation) is Literal:
        return ["no such choice", 3, True, ["a"]]
    if get_origin(annotation) is Union:  # a choice, or a number of ranks
        return ["no such choice", "3", 1, True, 2.5, ["a"]]
    return [3, True, 1.5, ["a"]]


@pytest.mark.parametrize("dotted", KEYS)
def test_types_are_strict(tmp_path: Path, dotted: str) -> None:
    path = write(tmp_path, "a.toml", "")
    for value in wrong_values(dotted):
        assert f"command line: {dotted} = " in refusal(path, override(dotted, value))


def beyond(dotted: str) -> list[float]:
    """The values nearest to a key's bounds that must be refused."""
    step = 1 if annotation_of(dotted) is int else 1e-9
    allowed = {"ge": -step, "le": step, "gt": 0, "lt": 0}
    return [getattr(m, name) + allowed[name] for m in KEYS[dotted].metadata for name in BOUNDS if hasattr(m, name)]


@pytest.mark.parametrize("dotted", [dotted for dotted in KEYS if beyond(dotted)])
def test_bounds(tmp_path: Path, dotted: str) -> None:
    path = write(tmp_path, "a.toml", "")
    for value in beyond(dotted):
        message = refusal(path, override(dotted, value))
        assert message.startswith(f"command line: {dotted} = {json.dumps(value)}: must be ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[training]\nglobal_batch_size = 0\n", "training.global_batch_size = 0: must be positive, or -1"),
        ("[training]\nlocal_batch_size = 4\nglobal_batch_size = 6\n", "is not a multiple of local_batch_size = 4"),
        ('[training]\ndtype = "bfloat16"\nmixed_precision_param = "float32"\n', 'set mixed_precision_param = "bf'),
        ("[parallelism]\ndata_parallel_shard_degree = 0\n", "must be positive, or -1"),
        ("[checkpoint]\nkeep_latest_k = 1\n", "checkpoint.keep_latest_k = 1 would leave nothing"),
        ("[validation]\nsteps = 0\n", "validation.steps = 0 validates nothing"),
        ('[job]\ndump_folder = ""\n', 'job.dump_folder = "": must not be empty'),
        ('[compile]\ncomponents = ["optimizer"]\n', "compile.components = \"optimizer\": must be 'model' or 'loss'"),
    ],
)
def test_checks_between_keys_and_of_values(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(write(tmp_path, "a.toml", text))
    assert message.startswith(f"{tmp_path / 'a.toml'}: ") and says in message


def test_a_value_with_line_breaks_still_gives_one_line(tmp_path: Path) -> None:
    assert '"a\\nb"' in refusal(write(tmp_path, "a.toml", '[optimizer]\nname = """a\nb"""\n'))


def values_of(dotted: str) -> st.SearchStrategy[Any]:
    """Values that the key accepts, as TOML gives them (lists, not tuples)."""
    annotation = annotation_of(dotted)
    limits = {name: getattr(m, name) for m in KEYS[dotted].metadata for name in BOUNDS if hasattr(m, name)}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        return st.lists(st.sampled_from(get_args(inner)) if get_origin(inner) is Literal else texts, max_size=3)
    if annotation is int:
        return st.integers(low, high - 1 if "lt" in limits else high)
    if annotation is float:
        finite = {"allow_nan": False, "allow_infinity": False}
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits, **finite)
    return st.booleans() if annotation is bool else texts


OVERRIDES = st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=12).flatmap(
    lambda keys: st.fixed_dictionaries({key: values_of(key) for key in keys})
)


@given(overrides=OVERRIDES)
def test_the_resolved_config_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, overrides: dict) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = write(folder, "round_trip.toml", "")
    try:
        config = load_config(path, overrides).config
    except UserError:
        assume(False)
    assert load_config(write(folder, "resolved.toml", dump_toml(config))).config == config


def test_files_and_overrides_resolve_alike(tmp_path: Path) -> None:
    tree = {"training": {"steps": 3}, "data": {"prepare": {"text": ["a b", 'c"d']}}, "optimizer": {"lr": 1}}
    flat = {"training.steps": 3, "data.prepare.text": ["a b", 'c"d'], "optimizer.lr": 1}
    from_file = load_config(write(tmp_path, "a.toml", tomli_w.dumps(tree))).config
    assert from_file == load_config(write(tmp_path, "b.toml", ""), flat).config


MIXED = """
[data]
sources = [{name = "x", paths = ["x"], weight = 1}, {name = "y", paths = ["y"]}]
stages = [{from_step = 9, weights = {y = 1}}, {from_step = 19, weights = {x = 1}}]
"""


def test_the_later_of_two_ways_to_give_data_holds(tmp_path: Path) -> None:
    write(tmp_path, "one.toml", '[data]\ntrain = "t"\n[data.prepare]\ntext = ["t"]\nvocab_size = 400')
    write(tmp_path, "mixed.toml", MIXED)
    data = load_config(write(tmp_path, "a.toml", 'extends = "one.toml"' + MIXED)).config.data
    assert (data.train, len(data.sources), data.prepare.text, data.prepare.vocab_size) == (None, 2, (), 400)
    others = '[[data.sources]]\nname = "z"\npaths = ["z"]'
    data = load_config(write(tmp_path, "c.toml", f'extends = "mixed.toml"\n{others}')).config.data
    assert ([source.name for source in data.sources], data.stages) == (["z"], ())
    data = load_config(write(tmp_path, "b.toml", 'extends = ["mixed.toml", "one.toml"]')).config.data
    assert (data.train, data.sources, data.stages) == ("t", (), ())
    data = load_config(tmp_path / "mixed.toml", {"data.train": "u"}).config.data
    assert (data.train, data.sources, data.stages) == ("u", (), ())
    assert "keep one of the two" in refusal(write(tmp_path, "d.toml", MIXED.replace("[data]", '[data]\ntrain = "t"')))
    assert "d.toml" in refusal(tmp_path / "d.toml")


def test_one_of_several_tables_is_changed_by_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", MIXED)
    loaded = load_config(path, {"data.stages.1.from_step": 12, "data.sources.0.max_epochs": 2.0})
    assert [stage.from_step for stage in loaded.config.data.stages] == [9, 12]
    assert [source.max_epochs for source in loaded.config.data.sources] == [2.0, None]
    assert "command line: data.stages.from_step = -1: must be at least 0" in refusal(
        path, {"data.stages.0.from_step": -1}
    )
    assert "there are 2 [[data.stages]]" in refusal(path, {"data.stages.2.from_step": 5})
    assert "data.stages = 3: must be a list" in refusal(write(tmp_path, "b.toml", "[data]\nstages = 3"), {})
