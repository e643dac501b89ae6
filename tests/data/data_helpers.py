"""Token files and processes for the tests of this folder."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from titanling.data.indexed import IndexedWriter, Sidecar, write_sidecar
from titanling.data.prepare.readers import Reading, Span, read_texts
from titanling.data.prepare.text import find_files

ROOT = Path(__file__).parents[2]


def write_documents(prefix: str, documents: list[list[int]], vocab_size: int, **changes: object) -> Sidecar:
    """Write .bin, .idx and .json for these documents; return the sidecar (with
    `changes` in it)."""
    with IndexedWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_document(np.array(ids))
    made = writer.sidecar(tokenizer_sha256="ab" * 32, eod_id=0, utf8_bytes=7, source="test")
    made = made.model_copy(update=changes)
    write_sidecar(prefix, made)
    return made


def json_lines(first: int, last: int) -> bytes:
    """JSON lines of short documents, each its number."""
    rows = [{"text": f"document {number}: " + "ñandú and other words " * (number % 7)} for number in range(first, last)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def texts_of(*sources: object) -> list[str]:
    """Every document of these files or folders, in order."""
    found = find_files([str(source) for source in sources])
    return [text for file in found for text in read_texts(Span(file), Reading(), Counter())]


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run this interpreter on the checkout."""
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}} | options
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


def start_python(*arguments: str) -> subprocess.Popen:
    """Start this interpreter on the checkout."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
