"""Folders that somebody else made: what links lead out of them to is neither read nor published, nothing hangs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conversion_helpers import write_checkpoint
from helpers import TinyData
from model_helpers import SHAPES, hf_twin, random_model

from titanling.checkpoint import tokenizer_files
from titanling.checkpoint.borrowed import own_file
from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.hf_folder import open_hf_folder
from titanling.checkpoint.import_model import import_hf, import_megatron
from titanling.errors import UserError

SECRET = "export TOKEN=secret"
COPIED = tokenizer_files.FILES[1:]  # the tokenizer itself is read, and would be none
Harm = Callable[[Path], None]


def link(path: Path) -> None:
    """To a file elsewhere."""
    path.symlink_to(path.parent.parent / "bashrc")


def chain(path: Path) -> None:
    """To a link beside it, which leads to a link elsewhere, which leads to the file."""
    (path.parent / "inner").symlink_to(path.parent.parent / "hop")
    (path.parent.parent / "hop").symlink_to(path.parent.parent / "bashrc")
    path.symlink_to("inner")


def blob(path: Path) -> None:
    """As Hugging Face's cache has it, but out of that."""
    path.symlink_to("../../blobs/" + "ab" * 20)


def circle(path: Path) -> None:
    """To itself."""
    path.symlink_to(path.name)


def device(path: Path) -> None:
    """What gives bytes without end."""
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """More than any such file has, though it takes no room."""
    with path.open("wb") as file:
        file.truncate(tokenizer_files.MOST_BYTES + 1)


HARMS = {
    "link": link,
    "chain": chain,
    "blob": blob,
    "circle": circle,
    "device": device,
    "pipe": os.mkfifo,
    "huge": huge,
}


@pytest.fixture
def borrowed(tmp_path: Path, tiny_data: TinyData) -> Path:
    """A tokenizer's directory beside a secret."""
    (tmp_path / "bashrc").write_text(SECRET)
    return Path(shutil.copytree(tiny_data.tokenizer, tmp_path / "tokenizer"))


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "additional_chat_templates/a.jinja"]
)
def test_an_export_publishes_nothing_from_elsewhere(name: str, harm: str, borrowed: Path, tiny_data: TinyData) -> None:
    checkpoint = write_checkpoint(borrowed.parent / "run", random_model(SHAPES["untied"]), tiny_data)
    path = borrowed / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    HARMS[harm](path)
    with pytest.raises(UserError, match=path.name):
        export_to_hf(checkpoint, borrowed.parent / "hf", tokenizer=borrowed)
    assert not list(borrowed.parent.glob("hf*"))


@pytest.mark.parametrize("name", COPIED)
def test_all_that_is_copied_is_looked_at(name: str, borrowed: Path, tiny_data: TinyData) -> None:
    (borrowed / name).unlink(missing_ok=True)
    link(borrowed / name)
    with pytest.raises(UserError, match=f"{name}: is a link, which is not followed; copy the directory with cp -rL"):
        tokenizer_files.tokenizer_names(borrowed)
    shutil.copytree(borrowed, borrowed.parent / "copy")  # the advice: as cp -rL, it follows links
    assert name in tokenizer_files.tokenizer_names(borrowed.parent / "copy")


@pytest.mark.parametrize("harm", [name for name in HARMS if name != "huge"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"])
def test_an_import_reads_nothing_from_elsewhere(name: str, harm: str, borrowed: Path) -> None:
    hf_twin(random_model(SHAPES["untied"])).save_pretrained(borrowed)
    (borrowed / name).unlink(missing_ok=True)
    HARMS[harm](borrowed / name)
    with pytest.raises(UserError, match=name):
        import_hf(borrowed, borrowed.parent / "converted")
    assert not list(borrowed.parent.glob("converted/*"))


def test_the_same_for_megatron(borrowed: Path) -> None:
    (borrowed / "all.safetensors").symlink_to(borrowed.parent / "bashrc")
    with pytest.raises(UserError, match=r"all.safetensors: is a link"):
        import_megatron(borrowed, borrowed.parent / "converted", SHAPES["untied"])


def test_the_cache_of_hugging_face_works(borrowed: Path, tiny_data: TinyData) -> None:
    hf_twin(random_model(SHAPES["untied"])).save_pretrained(borrowed, max_shard_size="30KB")
    (borrowed / "chat_template.jinja").write_text("{{ messages }}")
    cache = borrowed.parent / "models--somebody--something"
    snapshot = cache / "snapshots/0123456789abcdef"
    for folder in (snapshot, cache / "blobs"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(borrowed.iterdir())):
        shutil.copy(path, cache / f"blobs/{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (borrowed.parent / "refs").symlink_to(snapshot)  # a link to the folder is as good as the folder
    for folder in (snapshot, borrowed.parent / "refs"):
        assert open_hf_folder(folder)[0] == SHAPES["untied"]
    made = import_hf(snapshot, borrowed.parent / "converted")
    export_to_hf(made.path, borrowed.parent / "back")
    assert not any(path.is_symlink() for path in (borrowed.parent / "back").iterdir())
    assert (borrowed.parent / "back/chat_template.jinja").read_text() == "{{ messages }}"


def test_links_within_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    (tmp_path / "b").symlink_to("a")
    assert own_file(tmp_path / "b") == tmp_path.resolve() / "a"
    assert own_file(tmp_path / "c") is None
