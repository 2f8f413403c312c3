"""What runs in the planner's subprocess: `python -m llmjax.plan.child FOLDER` reads request.json, leaves result.json.

A process of its own, because the number of fake devices and the environment of the compilers are set before jax starts,
and because a failed check of a compiler ends its process.
"""

import json
import os
import resource
import sys
from pathlib import Path

from llmjax.config import InputError
from llmjax.experiment import load_experiment
from llmjax.plan import decode, planner
from llmjax.plan.target import parse


def main(folder: Path) -> None:
    """Make the plan, or say in `error` what is wrong with the request."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    request = json.loads((folder / "request.json").read_text())
    try:
        experiment, target = load_experiment(request["experiment"], request["overrides"]), parse(request["target"])
        step = request["step"]
        found = planner.make(experiment, target) if step == "train" else decode.make(experiment, target, step)
    except InputError as error:
        found = {"error": str(error)}
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
