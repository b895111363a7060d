"""The commands of the pipeline, which `make` and dvc.yaml use.

python -m lib.pipeline strip notebooks data/source      notebooks without outputs, for DVC
python -m lib.pipeline strip --in-place notebooks       the same in place, before a commit
python -m lib.pipeline run 03_pretrain pretrain mixed_2k --profile laptop
python -m lib.pipeline repro [PROFILE] [--data=FOLDER] [--text=FOLDER] [--set=section.key=value]
                             [--group=loss] [arguments of `dvc repro`, such as finetune@opl]
python -m lib.pipeline report [PROFILE] [--data=FOLDER]

--data   the tasks: a folder in any layout of lib/benchmark/sources.py, hub, or longembed
--text   the pretraining text: a folder of parquet, jsonl or txt, or hub
--set    "section.key=value …", over what params.yaml says for this run alone
--group  the rows of one group of params.yaml, and what they are built on
"""

import argparse
import sys
from pathlib import Path

from lib.pipeline import notebook, processes, profile
from lib.pipeline.errors import WorkbenchError


def main(arguments: list[str]) -> int:
    """Run a command. The exit code: 0; 1 after one line about what is wrong; 2 after the usage."""
    command, *rest = arguments or [""]
    if command not in COMMANDS:
        print(__doc__.partition("\n\n")[2], end="", file=sys.stderr)
        return 2
    try:
        return COMMANDS[command](rest) or 0
    except WorkbenchError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or command}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        print(error, file=sys.stderr)
        return 130
    return 1


def parser(command: str) -> argparse.ArgumentParser:
    # jsonschema would compile a grammar for URIs: 2 s of every stage, and no notebook needs it.
    sys.modules.setdefault("rfc3987_syntax", None)
    return argparse.ArgumentParser(prog=f"python -m lib.pipeline {command}")


def strip(arguments: list[str]) -> None:
    reader = parser("strip")
    reader.add_argument("--in-place", action="store_true")
    reader.add_argument("source", type=Path)
    reader.add_argument("destination", type=Path, nargs="?")
    options = reader.parse_args(arguments)
    if options.in_place == bool(options.destination):
        reader.error("give a destination, or --in-place")
    notebook.strip(options.source, options.destination or options.source)


def run(arguments: list[str]) -> None:
    reader = parser("run")
    reader.add_argument("notebook", help="its name in data/source, without .ipynb")
    reader.add_argument("stage")
    reader.add_argument("row", nargs="?")
    reader.add_argument("--profile", required=True)
    reader.add_argument("--measured", action="store_true", help="write it to the timings")
    options = reader.parse_intermixed_args(arguments)
    count = processes.count(options.profile, options.stage)
    if count > 1:
        return processes.launch(count, arguments)
    cost = notebook.run(**vars(options))
    if not processes.is_follower():
        print(f"{cost['stage']}: {cost['seconds']} s, {cost['peak_gib']} GiB at most", flush=True)


COMMANDS = {"strip": strip, "run": run, "kernel": notebook.kernel}
COMMANDS |= {"repro": profile.repro, "report": profile.report}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
