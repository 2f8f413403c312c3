"""The verbs of the command line: names, help and arguments; importing this costs nothing."""

from dataclasses import dataclass
from typing import Any

Argument = tuple[tuple[str, ...], dict[str, Any]]

EXPERIMENT: Argument = (
    ("experiment",),
    {"metavar": "EXPERIMENT", "help": "file.py, file.py:variant, or a run directory"},
)
RUN_DIR: Argument = (("run_dir",), {"metavar": "RUN_DIR", "help": "directory that `llmjax train` made"})
CHECKPOINT: Argument = (
    ("--checkpoint",),
    {"default": "best", "metavar": "best|last|STEP", "help": "which parameters (default: best, else the last)"},
)


@dataclass(frozen=True)
class Verb:
    """One verb: `llmjax.cli.commands.<module>.run(arguments)` does it and returns its JSON object."""

    name: str
    summary: str
    usage: str
    description: str
    example: str
    arguments: tuple[Argument, ...]
    overrides: bool = False
    """whether `--path.to.field=value` may follow"""
    module: str = ""
    """where it is done, for a name that no module can have; empty is the name"""


TRAIN = Verb(
    name="train",
    summary="train an experiment, or go on with a run",
    usage="EXPERIMENT [--run-dir=DIR] [--hosts=auto|N ...] [--path.to.field=value ...]",
    description=(
        "Train an experiment in a new run directory (config.json, metrics.jsonl, checkpoints/, plots/, report.html).\n"
        "On a directory that holds the run already it goes on from the last checkpoint; only steps, intervals and the\n"
        "mesh may then differ. SIGTERM and SIGINT save the step and end with exit code 0. With --hosts a run\n"
        "goes over several machines, which share the run directory: each of them runs this same command."
    ),
    example="llmjax train experiments/quickstart.py --run-dir=runs/first --train.steps=200",
    arguments=(
        EXPERIMENT,
        (("--run-dir",), {"metavar": "DIR", "help": "run directory (default: runs/NAME-N, the first N that is free)"}),
        (("--hosts",), {"metavar": "auto|N", "help": "processes of the run; auto: those of the cluster found"}),
        (("--host",), {"type": int, "metavar": "I", "help": "number of this process, 0 to N-1"}),
        (("--coordinator",), {"metavar": "HOST:PORT", "help": "process 0, as the others reach it"}),
        (
            ("--join-seconds",),
            {"type": int, "default": 300, "metavar": "S", "help": "how long to wait for the other processes (300)"},
        ),
    ),
    overrides=True,
)
EVAL = Verb(
    name="eval",
    summary="measure a run on its held-out data",
    usage="RUN_DIR [--checkpoint=best|last|STEP] [--path.to.field=value ...]",
    description="Loss, perplexity, bits per byte and accuracy over the held-out data, each token once.",
    example="llmjax eval runs/first --checkpoint=last --json",
    arguments=(RUN_DIR, CHECKPOINT),
    overrides=True,
)
GENERATE = Verb(
    name="generate",
    summary="continue a prompt with a run's model",
    usage="RUN_DIR [--prompt=TEXT] [--checkpoint=best|last|STEP] [--generate.field=value ...]",
    description=(
        "Continue a prompt; the text streams to the terminal. --json adds the tokens and their log-probabilities:\n"
        "under the distribution that was sampled from, and the model's own."
    ),
    example="llmjax generate runs/first --prompt='The for statement' --generate.temperature=0.8",
    arguments=(
        RUN_DIR,
        (("--prompt",), {"metavar": "TEXT", "help": "text to continue (default: the experiment's generate.prompt)"}),
        CHECKPOINT,
    ),
    overrides=True,
)
SHOW = Verb(
    name="show",
    summary="show an experiment or a run: config, parameters, arithmetic, memory",
    usage="EXPERIMENT|RUN_DIR [--docs] [--compile] [--path.to.field=value ...]",
    description=(
        "The resolved config, the parameter table, the arithmetic of a step and the memory it needs. Parameters,\n"
        "gradients and optimizer state are exact to the byte; activations are what the backward pass keeps, from a\n"
        "trace of the step (an upper bound: compilers fuse and share), or with --compile what the compiler reserves."
    ),
    example="llmjax show experiments/quickstart.py --docs --data.batch_size=64",
    arguments=(
        EXPERIMENT,
        (("--docs",), {"action": "store_true", "help": "say what each field of the config means"}),
        (("--compile",), {"action": "store_true", "help": "compile the step and show what the compiler reserves"}),
    ),
    overrides=True,
)
PLAN = Verb(
    name="plan",
    summary="compile an experiment for chips that are not there: memory, time, collectives",
    usage="EXPERIMENT|RUN_DIR --target=CHIP:SHAPE [--step=decode] [--search] [--path.to.field=value ...]",
    description=(
        "Compile the training step with the real compiler for CHIP:SHAPE (v4, v5e, v5p, v6e, tpu7x; h200, hosts x 1 x\n"
        "GPUs a host; cpu:N), and print whether it fits, the memory of a chip by class, the collectives along each\n"
        "axis of the mesh, and a step time and MFU from a roofline whose terms are shown. --step=decode takes the one\n"
        "that draws a token for each of data.batch_size rows whose cache holds data.length tokens, --step=prefill the\n"
        "one that fills the cache. TPUs need the extra `tpu`, GPUs `cuda`, none of them the chips. LIBTPU_INIT_ARGS\n"
        "is passed on."
    ),
    example="llmjax plan experiments/pods/llama3_8b.py --target=v5p:4x4x4 --json",
    arguments=(
        EXPERIMENT,
        (("--target",), {"required": True, "metavar": "CHIP:SHAPE", "help": "chips to plan for, such as v5p:4x4x4"}),
        (
            ("--step",),
            {"choices": ("train", "decode", "prefill"), "default": "train", "help": "what is compiled (train)"},
        ),
        (
            ("--chip-hour",),
            {"type": float, "default": 0.0, "metavar": "PRICE", "help": "price of an hour of a device, for the bill"},
        ),
        (
            ("--search",),
            {"action": "store_true", "help": "where it does not fit, try remat, meshes and microbatches in turn"},
        ),
    ),
    overrides=True,
)
LAUNCH = Verb(
    name="launch",
    summary="train on a TPU pod, a GKE or Slurm cluster, or in this machine's background",
    usage="EXPERIMENT --on=PLACE --name=NAME --target=CHIP:SHAPE [--dry-run] [--path.to.field=value ...]",
    description=(
        "Check the experiment and its mesh, then write the files and run the commands that start it, and start it\n"
        "again until it is done. PLACE is tpu-pod (Cloud TPU queued resources; --zone --spot --nfs), gke (a JobSet on\n"
        "TPU node pools; --image --claim --spot), slurm (GPU nodes; --partition --account --time) or box (this\n"
        "machine). CHIP:SHAPE is that of `llmjax plan`, for a TPU one slice: mesh.slices of it are ordered.\n"
        "--dry-run prints everything and runs nothing. Give the command in the root of the checkout."
    ),
    example=(
        "llmjax launch experiments/pods/llama3_8b.py --on=tpu-pod --name=llama3-8b --target=v5p:4x4x4 "
        "--nfs=10.0.0.2:/share --dry-run"
    ),
    arguments=(
        EXPERIMENT,
        (("--on",), {"required": True, "metavar": "PLACE", "help": "tpu-pod, gke, slurm or box"}),
        (("--name",), {"required": True, "metavar": "NAME", "help": "what machines, jobs and files are called"}),
        (("--target",), {"required": True, "metavar": "CHIP:SHAPE", "help": "such as v5p:4x4x4, h200:4x1x8 or cpu:1"}),
        (("--run-dir",), {"metavar": "DIR", "help": "run directory there (default: runs/NAME or /shared/NAME)"}),
        (("--dry-run",), {"action": "store_true", "help": "print files and commands, and run nothing"}),
        (("--zone",), {"metavar": "ZONE", "help": "tpu-pod: Google Cloud zone (default: gcloud's)"}),
        (("--spot",), {"action": "store_true", "help": "tpu-pod, gke: spare capacity, taken back at any time"}),
        (("--nfs",), {"metavar": "SERVER:/EXPORT", "help": "tpu-pod: file system that hosts mount on /shared"}),
        (("--image",), {"metavar": "IMAGE", "help": "gke: where the image of the commit is pushed to"}),
        (("--claim",), {"metavar": "NAME", "help": "gke: persistent volume claim that pods mount on /shared"}),
        (("--partition",), {"metavar": "NAME", "help": "slurm: partition"}),
        (("--account",), {"metavar": "NAME", "help": "slurm: account"}),
        (("--time",), {"metavar": "LIMIT", "help": "slurm: limit of one stay on the nodes, as 12:00:00"}),
    ),
    overrides=True,
)
IMPORT = Verb(
    name="import",
    summary="make a run directory of a Hugging Face model folder",
    usage="PATH RUN_DIR [--path.to.field=value ...]",
    description=(
        "Read config.json and *.safetensors of PATH (a folder, or with huggingface_hub the id of a repository) and\n"
        "write a run directory that `llmjax generate`, `eval`, `train` and `export` take: its experiment has the\n"
        "folder's model and tokenizer, all other fields as they are set here, and its checkpoint is of step 0.\n"
        "The tokenizer, generation config and chat template are kept beside it. Pickled weights are never read."
    ),
    example="llmjax import models/Llama-3.2-1B runs/llama --data.length=2048",
    module="import_hf",
    arguments=(
        (("path",), {"metavar": "PATH", "help": "folder with config.json and safetensors, or a hub id"}),
        (("run_dir",), {"metavar": "RUN_DIR", "help": "directory to make"}),
    ),
    overrides=True,
)
EXPORT = Verb(
    name="export",
    summary="write a run's model as a Hugging Face folder",
    usage="RUN_DIR PATH [--checkpoint=best|last|STEP] [--merge] [--dtype=float32|bfloat16|float16] [--max-shard-gb=N]",
    description=(
        "Write config.json and *.safetensors that `transformers` loads, with the tokenizer, generation config and\n"
        "chat template that the run was imported with, or the tokenizer that it has made. Of a model with adapters\n"
        "write adapter_config.json and adapter_model.safetensors that `peft` loads, or with --merge the whole model."
    ),
    example="llmjax export runs/llama models/mine --dtype=bfloat16",
    arguments=(
        RUN_DIR,
        (("path",), {"metavar": "PATH", "help": "folder to write"}),
        CHECKPOINT,
        (
            ("--merge",),
            {"action": "store_true", "help": "fold adapters into the weights, and make quantised weights dense"},
        ),
        (
            ("--dtype",),
            {"choices": ("float32", "bfloat16", "float16"), "default": "float32", "help": "of the tensors (float32)"},
        ),
        (
            ("--max-shard-gb",),
            {"type": float, "default": 5.0, "metavar": "N", "help": "largest file, in 10^9 bytes (5)"},
        ),
    ),
)
LIST = Verb(
    name="list",
    summary="list the components that a config can name, and the experiments",
    usage="[NAME]",
    description=(
        "Every component by its kind, and the experiment files below experiments/. NAME shows one component's fields."
    ),
    example="llmjax list Attention",
    arguments=((("component",), {"nargs": "?", "metavar": "NAME", "help": "a component or a kind of component"}),),
)
PLOT = Verb(
    name="plot",
    summary="draw the curves of one run, or of several over each other",
    usage="RUN_DIR [RUN_DIR ...] [--out=DIR]",
    description="PNG files: loss, bits per byte, learning rate, throughput, norms.",
    example="llmjax plot runs/quickstart-1 runs/quickstart-2 --out=runs/compared",
    arguments=(
        (("run_dirs",), {"nargs": "+", "metavar": "RUN_DIR", "help": "directories that `llmjax train` made"}),
        (
            ("--out",),
            {"metavar": "DIR", "help": "folder for the files (default: RUN_DIR/plots of one run, else plots)"},
        ),
    ),
)
DIFF = Verb(
    name="diff",
    summary="compare two experiments or runs field by field",
    usage="A B",
    description="One line for each field that differs: path, value in A, value in B.",
    example="llmjax diff experiments/quickstart.py runs/first",
    arguments=(
        (("a",), {"metavar": "A", "help": EXPERIMENT[1]["help"]}),
        (("b",), {"metavar": "B", "help": "likewise"}),
    ),
)
VERBS = {verb.name: verb for verb in (TRAIN, EVAL, GENERATE, SHOW, PLAN, LAUNCH, IMPORT, EXPORT, LIST, PLOT, DIFF)}
