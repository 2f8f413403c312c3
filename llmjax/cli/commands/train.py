"""`llmjax train EXPERIMENT`: a run from its experiment to its report."""

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax

from llmjax.cli.commands.generate import sample
from llmjax.cli.commands.show import arithmetic_rows, fields
from llmjax.cli.progress import Progress
from llmjax.cli.runs import open_run
from llmjax.cli.text import duration, short, table
from llmjax.config import ConfigError, InputError
from llmjax.data import Data
from llmjax.eval import ngram
from llmjax.eval.compressors import Rate, compare
from llmjax.experiment import Experiment, compatible, load, load_experiment, load_record, save
from llmjax.parallel import hosts
from llmjax.plan import arithmetic
from llmjax.report import history, page, plots
from llmjax.train import checkpoint
from llmjax.train.log import FILE
from llmjax.train.loop import fit, locked

CONFIG = "config.json"


def run(arguments: Namespace) -> dict[str, Any]:
    """Train, then draw, sample, compare and report; returns the run's figures."""
    join(arguments)
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    sums = arithmetic(experiment)
    named, fresh = hosts.on_first(lambda: claim(experiment, arguments))
    run_dir = Path(named)
    try:
        if hosts.first():
            print(f"run directory {run_dir}\n{table(arithmetic_rows(sums))}", flush=True)
            with Progress() as progress:
                result = fit(experiment, run_dir, report=progress)
        else:
            result = fit(experiment, run_dir)
    except InputError:
        if fresh and hosts.first():
            withdraw(run_dir)
        raise
    if hosts.first():
        result |= stopped(run_dir, result) if result["stopped"] == "signal" else finish(experiment, run_dir, result)
    hosts.wait("the report is written")
    return result


def join(arguments: Namespace) -> None:
    """Become one of several processes, where the arguments say so; raises InputError where they do not fit together."""
    if arguments.hosts is not None:
        hosts.join(arguments.hosts, arguments.host, arguments.coordinator, arguments.join_seconds)
        print(f"host {jax.process_index()} of {jax.process_count()}", flush=True)
    elif (arguments.host, arguments.coordinator) != (None, None):
        raise InputError("--host and --coordinator go with --hosts: say how many processes there are")


def stopped(run_dir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Say how to go on; adds nothing to the figures."""
    print(f"stopped by a signal; step {result['steps']} is saved: the same command with --run-dir={run_dir} goes on")
    return {}


def claim(experiment: Experiment, arguments: Namespace) -> tuple[str, bool]:
    """The run directory with this experiment's config.json in it, and whether it is new.

    Raises InputError where the directory holds another run, something else, or cannot be made.
    """
    again = Path(arguments.experiment).is_dir()
    named = arguments.run_dir or (arguments.experiment if again else None)
    run_dir = Path(named) if named else free(Path("runs"), experiment.name)
    fresh = not (run_dir / CONFIG).exists()
    if fresh and run_dir.exists() and any(not entry.name.startswith(".") for entry in entries(run_dir)):
        raise InputError(f"--run-dir={run_dir} holds files but no {CONFIG}: give a new or an empty directory")
    forbidden = [] if fresh else compatible(load(run_dir), experiment)
    if forbidden:
        raise ConfigError(
            f"{run_dir} holds another run ({'; '.join(forbidden)}): only steps, intervals and mesh may differ "
            "when a run goes on; give another --run-dir"
        )
    spec = (load_record(arguments.experiment).get("source") or {}).get("path") if again else arguments.experiment
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with locked(run_dir):
            save(experiment, run_dir, argv=arguments.argv, spec=spec)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"--run-dir={run_dir}: {error.strerror}: give a directory that can be written") from None
    return str(run_dir), fresh


def entries(folder: Path) -> list[Path]:
    """What is in a folder; raises InputError where it is none."""
    if not folder.is_dir():
        raise InputError(f"--run-dir={folder} is a file: give a directory")
    return list(folder.iterdir())


def free(folder: Path, name: str) -> Path:
    """The first of folder/name-1, folder/name-2, ... that is not there yet."""
    return next(path for n in itertools.count(1) if not (path := folder / f"{name}-{n}").exists())


def withdraw(run_dir: Path) -> None:
    """Undo `claim` for a run that never began because its input was bad, so that the corrected one may begin here."""
    log, folder = run_dir / FILE, run_dir / checkpoint.FOLDER
    if checkpoint.steps(run_dir) or (log.exists() and log.stat().st_size):
        return
    for path in (run_dir / CONFIG, log):
        path.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def finish(experiment: Experiment, run_dir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Curves, a sample, the comparison with compressors and counts, the page; returns what they add to the figures.

    A model of several hosts draws no sample here: it need not fit into one.
    """
    prompt = experiment.generate.prompt
    drawn = experiment.model.generates() and not hosts.several()
    text = sample(open_run(run_dir, "best"), prompt).text if drawn else None
    measured = result.get("val_bits_per_byte") is not None
    data = experiment.data if measured and isinstance(experiment.data, Data) else None
    rates, counted = (None, None) if data is None else (compare(data), ngram.compare(data))
    logged = history.read(run_dir)
    files = plots.save({experiment.name: logged}, run_dir / "plots")
    rows = comparison(result["val_bits_per_byte"], counted, rates) if rates and counted is not None else []
    document = page.Page(
        title=experiment.name,
        subtitle=f"step {result['steps']} of {experiment.train.steps}, run directory {run_dir.resolve().name}",
        figures=headline(experiment, result),
        history=logged,
        comparison=rows,
        comparison_note=note(experiment),
        samples=[] if text is None else [(prompt, text)],
        arithmetic=arithmetic_rows(arithmetic(experiment)),
        config=fields(experiment),
        origin=origin(load_record(run_dir)),
    )
    written = page.write(document, run_dir)
    print(f"\n{table(headline(experiment, result))}")
    if rows:
        print(f"\n{table(rows, right=(1, 2))}\n{note(experiment)}")
    if text is not None:
        print(f"\nsample: {prompt}{page.visible(text)}")
    print(f"\nreport {written}, plots {run_dir / 'plots'}")
    return {
        "compressors": {name: rate._asdict() for name, rate in rates.items()} if rates else None,
        "ngram_bits_per_byte": counted,
        "sample": None if text is None else {"prompt": prompt, "text": text},
        "plots": files,
        "report": written,
    }


NOTE = (
    "Bits per byte of the held-out text. A model has read the training text, an n-gram has counted it; compressors are "
    "shown alone and after the same text (zlib: its last 32 kB as dictionary; bz2, xz: size of training and held-out "
    "text, less training)."
)


def note(experiment: Experiment) -> str:
    """What the table compares."""
    count = experiment.train.eval_batches
    return NOTE + (f" The model was measured on the first {count} batches of that text only." if count else "")


def comparison(bits: float, counted: float, rates: dict[str, Rate]) -> list[tuple[str, str, str]]:
    """The table of the model beside the n-gram and the compressors, its heading first."""
    rows = [(name, f"{rate.alone:.3f}", f"{rate.given_training_text:.3f}") for name, rate in rates.items()]
    models = [("this model", "", f"{bits:.3f}"), (f"{ngram.ORDER}-gram of bytes", "", f"{counted:.3f}")]
    return [("held-out bits per byte", "alone", "given the training text"), *models, *rows]


def headline(experiment: Experiment, result: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a run in words, those that it has."""
    shown = [
        ("held-out bits per byte", result.get("val_bits_per_byte"), "{:.3f}"),
        ("held-out perplexity", result.get("val_perplexity"), "{:.2f}"),
        ("held-out accuracy", result.get("val_accuracy"), "{:.1%}"),
        ("tokens per second", result["tokens_per_second"], "{:,.0f}"),
        ("steps", result["steps"], "{:,}"),
    ]
    return [(name, form.format(value)) for name, value, form in shown if value is not None] + [
        ("tokens", short(result["tokens"])),
        ("parameters", short(experiment.model.num_params())),
        ("training time", duration(result["train_seconds"])),
        ("compilation", f"{result['compile_seconds']:.1f} s"),
    ]


def origin(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs to make the run again."""
    git = record.get("git")
    commit = f"{git['commit']}{' with changes' if git['dirty'] else ''}" if git else ""
    packages = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items() if version)
    rows = [("command", " ".join(record.get("argv", ()))), ("commit", commit), ("packages", packages)]
    return [(name, value) for name, value in [*rows, ("python", record.get("python", ""))] if value]
