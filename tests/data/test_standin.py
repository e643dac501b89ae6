"""The stand-in for the data of train_configs/, and each of these configs over it, scaled down, as docs/data.md says."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, run_python, run_train, snapshot

from titanling.config import load_config
from titanling.data.indexed import read_sidecar
from titanling.data.prepare import found_text
from titanling.data.prepare.standin import ALPHABETS, Made, _write_text, make_standin

VOCAB = 600
BYTES = 20_000
MAKE = ("scripts/make_standin.py", "--bytes-per-source", str(BYTES), "--vocab-size", str(VOCAB), "--output")
NAMES = {f"{kind}-{language}" for kind in ("web", "hq") for language in ALPHABETS} | {"code"}


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in of what this machine has, made by the command."""
    folder = tmp_path_factory.mktemp("standin")
    done = run_python(*MAKE, folder)
    assert done.returncode == 0, done.stderr
    assert f"\n{folder}: 27 sources\n" in done.stdout
    return folder


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No documentation, manuals or translations."""
    monkeypatch.setattr(found_text, "SHARE", tmp_path / "share")
    monkeypatch.setattr(found_text, "PACKAGES", ())
    found_text._catalogues.cache_clear()
    yield
    found_text._catalogues.cache_clear()


def made(folder: Path) -> dict[str, Made]:
    rows = json.loads((folder / "text/sources.json").read_text(encoding="utf-8"))
    return {name: Made(**row) for name, row in rows.items()}


def test_it_has_the_sources_of_minilingua(standin: Path) -> None:
    sources = load_config(ROOT / "train_configs/minilingua_1b.toml").config.data.sources
    assert {source.name for source in sources} == NAMES == made(standin).keys()
    seen: set[str] = set()
    for name, source in made(standin).items():
        sidecar = read_sidecar(str(standin / name / "train"))
        assert sidecar.documents == source.documents >= source.held_out >= 1
        texts = [path.read_text("utf-8") for path in (standin / "text").glob(f"*/{name}/*.txt")]
        assert len(texts) == sum(source.origins.values()) == source.documents + source.held_out
        assert sum(len(text.encode()) for text in texts) == source.bytes >= BYTES // 5
        assert not seen & set(texts)
        seen |= set(texts)
    train, validation = (read_sidecar(str(standin / name)) for name in ("train", "validation"))
    assert train.documents == sum(source.documents for source in made(standin).values())
    assert validation.documents == sum(source.held_out for source in made(standin).values())
    assert train.vocab_size == VOCAB


def test_made_again_it_stays(standin: Path) -> None:
    before = snapshot(standin)
    assert run_python(*MAKE, standin).returncode == 0
    assert snapshot(standin) == before


def test_a_bare_machine_says_that_it_has_pseudo_text(bare_machine: None, tmp_path: Path) -> None:
    lines = list(make_standin(str(tmp_path / "a"), BYTES, VOCAB))
    sources = made(tmp_path / "a")
    assert sources.keys() == NAMES
    for name, source in sources.items():
        real = {"web-en": "docstrings", "hq-en": "Python's reference", "code": "Python's standard library"}
        assert set(source.origins) == {real.get(name, "pseudo-text")}
    assert any(line.startswith("web-el") and line.endswith(f"pseudo-text ({sources['web-el'].origins['pseudo-text']})")
               for line in lines)  # fmt: skip
    texts = [path.read_text("utf-8") for path in (tmp_path / "a/text").glob("*/web-el/*.txt")]
    assert texts and set("".join(texts)) <= set(ALPHABETS["el"] + " .")
    again = tmp_path / "b/text"
    again.parent.mkdir()
    _write_text(again, BYTES)
    assert snapshot(again) == snapshot(tmp_path / "a/text")
    assert [path.name for path in again.parent.iterdir()] == ["text"]


def test_manuals_and_catalogues_are_read(tmp_path: Path, bare_machine: None) -> None:
    share = tmp_path / "share"
    (share / "man/fi/man1").mkdir(parents=True)
    page = '.\\" a comment\n.TH ls 1\n.SH NIMI\nls \\- n\\[u00E4]yt\\(:a \\fBhakemisto\\fR\n.PP\n.B ls\n[\\fIx\\fR]\n'
    (share / "man/fi/man1/ls.1").write_text(page, encoding="utf-8")
    (text,) = found_text.manuals("fi")
    assert text.split() == ["NIMI", "ls", "-", "n", "yt", "hakemisto", "ls", "[x]"]
    folder = share / "locale/sv_SE/LC_MESSAGES"
    folder.mkdir(parents=True)
    write_catalogue(folder / "a.mo", {"": "Content-Type: text/plain; charset=UTF-8\n", "file\0files": "fil\0filer"})
    (folder / "b.mo").write_bytes(b"\xde\x12\x04\x95 cut off")
    (folder / "c.mo").write_bytes(b"none of them")
    assert list(found_text.translations("sv")) == ["fil\nfiler"] and list(found_text.translations("nb")) == []


def write_catalogue(path: Path, messages: dict[str, str]) -> None:
    """A .mo file, by Python's own reader checked."""
    import gettext
    import struct

    pairs = sorted((key.encode(), text.encode()) for key, text in messages.items())
    head, at, tables, strings = 28, 28 + 16 * len(pairs), [b"", b""], b""
    for table in (0, 1):
        for pair in pairs:
            tables[table] += struct.pack("<2I", len(pair[table]), at + len(strings))
            strings += pair[table] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), head, head + 8 * len(pairs), 0, 0)
    path.write_bytes(header + b"".join(tables) + strings)
    with path.open("rb") as file:
        assert gettext.GNUTranslations(file).ngettext("file", "files", 2) == "filer"


TINY = (
    "--model.dim=32 --model.n_layers=2 --model.n_heads=4 --model.n_kv_heads=2 --model.ffn_dim=64"
    f" --model.vocab_size={VOCAB} --training.seq_len=64 --training.local_batch_size=2 --training.global_batch_size=8"
    " --training.steps=6 --lr_scheduler.warmup_steps=2 --validation.steps=2 --metrics.log_freq=1"
    " --metrics.enable_tensorboard=false --compile.enable=false --checkpoint.async_mode=disabled"
).split()


def tiny(name: str, standin: Path, folder: Path) -> list[str]:
    """The command that runs a config over the stand-in, scaled down."""
    if name.startswith("minilingua"):
        data = [f"--data.root={standin}", "--data.stages.0.from_step=3"]
    else:
        data = [f"--data.train={standin / ('web-de' if name.startswith('llammlein') else 'web-en')}/train"]
    rest = [f"--data.validation={standin}/validation", f"--model.hf_assets_path={standin}/tokenizer"]
    return ["--config", f"train_configs/{name}.toml", f"--job.dump_folder={folder}", *data, *rest, *TINY]


@pytest.mark.parametrize(
    "name",
    [
        "minilingua_1b",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("minilingua_100m", "llammlein_7b", "dense_180m", "custom_300m")
        ),
    ],
)
def test_a_config_runs_here(standin: Path, tmp_path: Path, name: str) -> None:
    done = run_train(*tiny(name, standin, tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6] and rows[-1]["step"] == 6
    if name.startswith("minilingua"):
        assert "data: 27 sources; their shares change at step 3" in done.stdout
        shares = [line.split()[1:4:2] for line in done.stdout.splitlines() if line.split()[:1] == ["hq-fi"]]
        assert "  hq-fi    0.10 % →  1.20 %" in done.stdout, shares
    if name == "custom_300m":
        assert all(row["loss_scale"] >= 1 for row in rows if "loss" in row)


def test_damaged_files_of_the_machine_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(" ".join(map(str, range(9999))).encode())
    (tmp_path / "doc").mkdir()
    (tmp_path / "doc" / "README.gz").write_bytes(packed[:500] + bytes(100) + packed[600:])
    (tmp_path / "doc" / "README.md").write_text("good")
    monkeypatch.setattr(found_text, "SHARE", tmp_path)
    assert list(found_text.documentation()) == ["good"]
