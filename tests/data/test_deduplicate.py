"""scripts/deduplicate.py: datatrove's MinHash on real files, here and through Slurm's commands."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import run_python

pytest.importorskip("datatrove")
PLACES = "river tower harbour market bridge garden castle station library museum".split()
ANIMALS = "heron badger otter falcon lynx marten beaver kestrel hare stoat".split()
FAST = ("--buckets", "4", "--hashes", "2")


def story(seed: int) -> str:
    """A text that shares no n-gram of five words with that of another seed."""
    place, animal = PLACES[seed % 10], ANIMALS[seed // 10 % 10]
    return " ".join(f"{animal} {place} {other} {place} {animal} {other}{animal}" for other in PLACES + ANIMALS)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two files of 12 stories each; in the second three are near or exact copies of earlier ones."""
    near = story(3).replace("badger", "beaver", 1).upper() + "!"
    files = {"a": [*map(story, range(12))], "b": [near, story(5), *map(story, range(12, 20)), "two words", story(13)]}
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, texts in files.items():
        lines = "".join(json.dumps({"id": f"{name}{index}", "text": text}) + "\n" for index, text in enumerate(texts))
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def run(raw: Path, output: Path, *more: str, **options) -> subprocess.CompletedProcess:
    """The script as a user calls it."""
    return run_python(
        "scripts/deduplicate.py", "--input", f"{raw}/*.gz", "--output", str(output), *FAST, *more, **options
    )


def texts(folder: Path, field: str = "text") -> list[str]:
    """All texts of an output, in order; or its names."""
    lines = [line for path in sorted(folder.iterdir()) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return [json.loads(line)[field] for line in lines]


def test_one_of_each_near_copies_stays(raw: Path, tmp_path: Path) -> None:
    output = tmp_path / "clean"
    done = run(raw, output, "--workers", "2", "--id-field", "id")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == f"{output}: 21 of 24 documents stay, 3 were nearly the same as another\n"
    assert texts(output) == [*map(story, range(20)), "two words"]
    names = [f"a{index}" for index in range(12)] + [f"b{index}" for index in range(2, 11)]
    assert texts(output, "id") == names
    assert not Path(f"{output}.partial").exists()
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sorted(first) == ["00000.jsonl.gz", "00001.jsonl.gz"]
    refused = run(raw, output)
    assert refused.returncode == 2 and f"{output}: exists" in refused.stderr


def test_a_damaged_file_is_named_and_the_same_command_goes_on(raw: Path, tmp_path: Path) -> None:
    output, damaged = tmp_path / "clean", raw / "b.jsonl.gz"
    whole = damaged.read_bytes()
    lines = gzip.decompress(whole).replace(b'{"id": "b4"', b'{"id"; "b4"')
    damaged.write_bytes(gzip.compress(lines)[: len(whole)].ljust(len(whole)))  # of the same size, as of a slow copy
    refused = run(raw, output)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and str(damaged) in refused.stderr
    assert not output.exists()
    damaged.write_bytes(whole)
    other = run(raw, output, "--seed", "2")
    assert other.returncode == 2 and "was begun with other files or settings" in other.stderr
    assert run(raw, output).stdout.startswith(f"{output}: 21 of 24 documents stay")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--buckets", "0"), "--buckets 0: must be 1 or more"),
        (("--slurm",), "--partition and --slurm belong together"),
        (("--slurm", "--partition", "p", "--sbatch", "account"), "--sbatch account: write KEY=VALUE"),
        (("--seed", "-1"), "--seed -1: must be 0"),
        (("--input", "nowhere/*.gz"), '--input: "nowhere/*.gz" is no file'),
    ],
)
def test_wrong_arguments_are_one_line(raw: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run(raw, tmp_path / "clean", *arguments)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_missing_extra_is_named_with_its_command(raw: Path, tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.modules['datatrove'] = None; "
        f"sys.argv = ['deduplicate.py', '--input', '{raw}', '--output', '{tmp_path}/clean']; "
        "runpy.run_path('scripts/deduplicate.py', run_name='__main__')"
    )
    done = run_python("-c", program)
    assert done.returncode == 2 and "pip install 'titanling[datatrove]'" in done.stderr and done.stderr.count("\n") == 1


SBATCH = """#!{python}
import os, shutil, sys
folder = {folder!r}
number = len(os.listdir(folder)) + 1
with open(f"{{folder}}/{{number:02d}}", "w") as file:
    file.write(" ".join(sys.argv[1:-1]) + "\\n" + open(sys.argv[-1]).read())
print("Submitted batch job", 1000 + number)
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = "#!/bin/bash\necho localhost\n"


@pytest.fixture
def cluster(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder for the scripts that sbatch is given, and an environment with Slurm's commands."""
    jobs, commands = tmp_path / "jobs", tmp_path / "commands"
    jobs.mkdir()
    commands.mkdir()
    sbatch = SBATCH.format(python=sys.executable, folder=str(jobs))
    for name, text in (("sbatch", sbatch), ("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return jobs, os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}


SLURM = ("--slurm", "--partition", "small", "--time", "01:00:00", "--sbatch", "account=project_1", "--workers", "3")


def test_jobs_of_slurm_are_submitted_one_after_another(
    raw: Path, tmp_path: Path, cluster: tuple[Path, dict[str, str]]
) -> None:
    jobs, environment = cluster
    output = tmp_path / "clean"
    done = run(raw, output, *SLURM, env=environment)
    assert done.returncode == 0 and f"{output}.partial/logs" in done.stdout, done.stderr
    scripts = [path.read_text() for path in sorted(jobs.iterdir())]
    stages = [text for text in scripts if "launch_pickled_pipeline" in text]
    names = ["signatures", "buckets", "clusters", "filter", "publish"]
    assert len(scripts) == 10 and len(stages) == 5  # and one for the statistics of each
    previous = ""
    for name, tasks, text in zip(names, (2, 4, 1, 2, 1), stages, strict=True):
        for line in (f"job-name=minhash-{name}", f"array=0-{tasks - 1}%3", "partition=small", "time=01:00:00"):
            assert f"#SBATCH --{line}\n" in text
        assert "#SBATCH --account=project_1\n" in text and "--qos" not in text
        assert f"{output}.partial/logs/{name}/executor.pik" in text
        assert subprocess.run(["bash", "-n"], input=text.partition("\n")[2], text=True).returncode == 0
        head = text.partition("\n")[0]
        assert ("--dependency=afterok:" + previous in head) if previous else ("--dependency" not in head)
        previous = str(1001 + scripts.index(text))
    assert not output.exists()
