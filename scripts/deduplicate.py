"""Drop documents that are nearly the same as another (MinHash, by datatrove), here or as jobs of Slurm."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import os

from titanling.cli import add_format, path_or_url, run, say
from titanling.errors import UserError

EXAMPLE = """example:
  python scripts/deduplicate.py --input 'raw/*.jsonl.gz' --output clean/ --workers 8
  python scripts/prepare_data.py --text 'clean/*.jsonl.gz' --output data/mine

on a cluster, from a login node, with paths that the nodes see too:
  python scripts/deduplicate.py --input 'raw/*.jsonl.gz' --output clean/ --slurm --partition small --time 08:00:00 \\
      --sbatch account=project_1

Each file of --input becomes one of --output, JSON lines with the text and, with --id-field, the name.
Needs: pip install 'titanling[datatrove]'
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or globs, as prepare_data.py --text")
    add("--output", type=path_or_url, required=True, help="folder to write; it appears when all is done")
    add_format(parser)
    add("--text-field", default="text", help="key or column that holds the text (default: text)")
    add("--id-field", help="key or column of the documents' names, kept beside the text")
    add("--skip-bad", action="store_true", help="leave out documents that cannot be read")
    add("--n-grams", type=int, default=5, help="words of an n-gram (default: 5)")
    add("--buckets", type=int, default=14, help="groups of hashes; more find more (default: 14)")
    add("--hashes", type=int, default=8, help="hashes of a group; more find less (default: 8)")
    add("--seed", type=int, default=1, help="chooses the hashes (default: 1)")
    add("--workers", type=int, help="tasks at the same time (default: 1; with --slurm as many as there are)")
    add("--slurm", action="store_true", help="submit jobs instead of working here")
    add("--partition", help="Slurm: where the jobs run")
    add("--time", default="04:00:00", help="Slurm: limit of each job (default: 04:00:00)")
    add("--mem-per-cpu-gb", type=int, default=4, help="Slurm: memory of each task (default: 4)")
    add("--sbatch", nargs="+", default=[], metavar="KEY=VALUE", help="Slurm: further options of sbatch")
    return parser.parse_args()


def main() -> None:
    """Arguments → documents that stay."""
    arguments = parse_arguments()
    for flag in ("n_grams", "buckets", "hashes", "workers", "mem_per_cpu_gb"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be 1 or more")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: must be 0 … {2**32 - 1}")
    options = dict(_option(option) for option in arguments.sbatch)
    if arguments.slurm != (arguments.partition is not None):
        raise UserError("--partition and --slurm belong together; give both or neither")
    # Imported late, so that --help answers at once.
    from titanling.data.prepare.filters.extras import import_extra
    from titanling.data.prepare.readers import Reading
    from titanling.data.prepare.text import find_files

    os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's bar of one of its stages
    import_extra("datatrove", "datatrove", "scripts/deduplicate.py")
    from titanling.data.prepare.minhash import MinHash, Slurm, deduplicate, submit

    try:
        files = find_files(arguments.input)
    except UserError as error:  # it names the key of the config
        raise UserError(str(error).replace("data.prepare.text", "--input")) from None
    reading = Reading(
        arguments.text_field,
        arguments.id_field,
        skip_bad=arguments.skip_bad,
        format=arguments.format or "auto",
        document_separator=arguments.document_separator,
    )
    settings = MinHash(arguments.n_grams, arguments.buckets, arguments.hashes, arguments.seed)
    output = arguments.output.rstrip("/")
    if arguments.slurm:
        workers = arguments.workers or -1
        slurm = Slurm(arguments.partition, arguments.time, arguments.mem_per_cpu_gb, workers, options)
        work = submit(files, output, reading, settings, slurm)
        say(f"submitted; logs and scripts are in {work}/logs, and {output} appears when all is done")
        return
    before, behind = deduplicate(files, output, reading, settings, arguments.workers or 1)
    say(f"{output}: {behind:,} of {before:,} documents stay, {before - behind:,} were nearly the same as another")


def _option(option: str) -> tuple[str, str]:
    key, equals, value = option.lstrip("-").partition("=")
    if not key or not equals:
        raise UserError(f"--sbatch {option}: write KEY=VALUE, as account=project_1")
    return key, value


if __name__ == "__main__":
    run(main, "the same command goes on from OUTPUT.partial", reports=True)
