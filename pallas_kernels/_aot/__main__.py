"""`python -m pallas_kernels._aot TARGET MODULE:BUILDER JSON --report=cycles,slots` prints one line of JSON."""

import argparse
import dataclasses
import json
import sys

from pallas_kernels._aot import REPORTS, CompileError, compile_for


def main() -> None:
    """Parse the command line, compile, print the report."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels._aot", description="Compile for an absent chip.")
    parser.add_argument("target", help="v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1, h200:1x1x1 ...")
    parser.add_argument("builder", help="package.module:function or path/file.py:function")
    parser.add_argument("arguments", nargs="?", default="{}", help="the builder's arguments, a JSON object")
    parser.add_argument("--report", default="", help=f"comma-separated: {', '.join(REPORTS)}")
    parser.add_argument("--memory-limit", type=float, default=6.0, help="GiB")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds")
    given = parser.parse_args()
    try:
        report = compile_for(
            given.target,
            given.builder,
            json.loads(given.arguments),
            report=[name for name in given.report.split(",") if name],
            memory_limit=int(given.memory_limit * 2**30),
            time_limit=given.time_limit,
        )
    except (CompileError, ValueError) as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(report) | {"total_cycles": report.total_cycles}))


if __name__ == "__main__":
    main()
