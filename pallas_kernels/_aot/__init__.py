"""Compile a function for a TPU or GPU that is not there, and report what the compiler says about it.

The real compilers run: libtpu for TPUs, XLA:GPU with ptxas for GPUs. Each compile runs in a subprocess with a cap on
its memory and its time, because a failed check of a compiler aborts the process and some inputs eat all memory.
By hand: `python -m pallas_kernels._aot v5p:2x2x1 package.module:builder '{"length": 4096}' --report=cycles`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pallas_kernels._aot.dumps import (
    Kernel,
    Slots,
    gpu_kernels,
    hlo_order,
    tensor_core_instructions,
    tpu_cycles,
    tpu_slots,
)

__all__ = ["CompileError", "Kernel", "Report", "Slots", "compile_for"]

REPORTS = ("cycles", "slots", "registers")


class CompileError(RuntimeError):
    """The compiler refused, crashed, or outran its memory or its time; the message ends with its last words."""


@dataclass(frozen=True)
class Report:
    """What a compiler said about one program. Fields that were not asked for, or that the target lacks, are empty."""

    target: str
    builder: str
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    lower_seconds: float
    compile_seconds: float
    order: dict[str, tuple[str, ...]]
    """Collectives and custom calls of each HLO computation, in schedule order, as "opcode or target:name"."""
    cycles: dict[str, int] = field(default_factory=dict)
    """TPU: the compiler's estimate by HLO operation. A run-time trip count counts as about 1."""
    slots: dict[str, Slots] = field(default_factory=dict)
    """TPU: bundles and use of their slots by HLO operation."""
    kernels: tuple[Kernel, ...] = ()
    """GPU: registers, spills and barriers of each kernel, XLA's own fusions included."""
    wgmma: int = 0
    """GPU: warp-group matrix instructions (Hopper) in the PTX of all kernels."""
    mma_sync: int = 0
    """GPU: warp matrix instructions (Ampere) in the PTX of all kernels."""

    @property
    def total_cycles(self) -> int:
        """TPU: the sum of `cycles`."""
        return sum(self.cycles.values())

    @property
    def spill_bytes(self) -> int:
        """GPU: bytes a thread stores and loads because registers ran out, over all kernels."""
        return sum(kernel.spill_store_bytes + kernel.spill_load_bytes for kernel in self.kernels)


def compile_for(
    target: str,
    builder: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    report: Collection[str] = (),
    memory_limit: int = 6 * 2**30,
    time_limit: float = 300.0,
) -> Report:
    """Compile what `builder` builds for `target` ("v5p:2x2x1", "h200:1x1x1") in a subprocess and read the dumps.

    `builder` is "package.module:name" or "path/file.py:name" of a function that is called with `arguments` (JSON values
    by keyword) and returns (function, arguments of the function as a tuple of pytrees with shape and dtype leaves).
    Leaves with a `sharding` keep it; the others are whole on the first device. A builder with a parameter `devices` is
    given the absent devices, to make those shardings. `report` adds to memory and order: "cycles" and "slots" (TPU),
    "registers" (GPU). `memory_limit` in bytes, `time_limit` in seconds.
    Raises ValueError for a report nobody makes, CompileError where the compile does not end well or the compiler leaves
    nothing of what was asked for ("cycles" of a GPU).
    """
    if unknown := set(report) - set(REPORTS):
        raise ValueError(f"report={sorted(unknown)} is unknown: use some of {', '.join(REPORTS)}")
    with tempfile.TemporaryDirectory(prefix="aot-") as temporary:
        folder = Path(temporary)
        request = {"target": target, "builder": builder, "arguments": dict(arguments or {})}
        (folder / "request.json").write_text(json.dumps(request | {"memory_limit": memory_limit}))
        output = _run(folder, report, f"{builder} for {target}", time_limit)
        result = json.loads((folder / "result.json").read_text())
        order = hlo_order((folder / "module.txt").read_text())
        found: dict[str, Any] = {}
        if "cycles" in report:
            found["cycles"] = tpu_cycles(path.read_text() for path in sorted(folder.glob("profile/*")))
        if "slots" in report:
            found["slots"] = tpu_slots(folder / "llo")
        if "registers" in report:
            found |= _gpu_report(folder / "xla", output)
        for name, dump in (("cycles", "cycles"), ("slots", "slots"), ("registers", "kernels")):
            if name in report and not found[dump]:  # an empty report would pass any gate
                raise CompileError(f"{builder} for {target}: the compiler left no {name}")
        return Report(target=target, builder=builder, order=order, **result, **found)


def _run(folder: Path, report: Collection[str], what: str, time_limit: float) -> str:
    """Run the child in `folder`; returns what it printed, or raises CompileError with its last words."""
    command = [sys.executable, "-m", "pallas_kernels._aot.child", str(folder)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(folder, report),
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        raise CompileError(f"{what}: not compiled within {time_limit:g} s") from None
    finally:  # the child is a session of its own: an interrupt does not reach it, nor the assembler it may have started
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode:
        end = f"signal {signal.Signals(-child.returncode).name}" if child.returncode < 0 else "an error"
        raise CompileError(f"{what}: the compile ended with {end}\n{_last_words(errors)}")
    return output


def _environment(folder: Path, report: Collection[str]) -> dict[str, str]:
    """The child's environment: no device is started, no cache hides the dumps, the compilers write into `folder`."""
    environment = dict(os.environ)
    # Flags meant for the caller's own compiler (a number of fake CPU devices) are not for this one.
    environment.pop("XLA_FLAGS", None)
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    flags = [environment.get("LIBTPU_INIT_ARGS", "")]
    if "cycles" in report:
        (folder / "profile").mkdir()
        flags.append(f"--xla_jf_dump_static_llo_profile_to={folder / 'profile'}")
    if "slots" in report:
        (folder / "llo").mkdir()
        flags.append(f"--xla_jf_dump_to={folder / 'llo'} --xla_jf_dump_llo_text=true")
    if "registers" in report:
        environment |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        environment["XLA_FLAGS"] = f"--xla_dump_to={folder / 'xla'}"
    environment["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()
    return environment


def _last_words(errors: str) -> str:
    """The last lines of standard error that say something: no addresses, crash reporter or notices."""
    noise = re.compile(r" +@ +0x|https://symbolize|E\d{4} .*RAW:|W\d{4} |.*WARNING: |-{20}|For simplicity, JAX")
    return "\n".join([line[:2000] for line in errors.splitlines() if line.strip() and not noise.match(line)][-25:])


def _gpu_report(folder: Path, output: str) -> dict[str, Any]:
    """Registers, spills and matrix instructions: Mosaic GPU's kernels from `output`, XLA's from their dumped PTX."""
    kernels, ptx = gpu_kernels(output), [output]
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        if ".entry" not in text:  # a module of constants
            continue
        ptx.append(text)
        command = [_ptxas(), "-v", "--gpu-name", "sm_90a", "--output-file", os.devnull, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"ptxas refused {path.name}\n{_last_words(done.stderr)}")
        kernels += gpu_kernels(done.stdout + done.stderr)
    wgmma, mma_sync = tensor_core_instructions("\n".join(ptx))
    return {"kernels": kernels, "wgmma": wgmma, "mma_sync": mma_sync}


def _ptxas() -> str:
    """The assembler that the CUDA packages of this environment bring, or the one on the path."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/ptxas"))
    found = str(packaged[-1]) if packaged else shutil.which("ptxas")
    if found is None:
        raise CompileError("no ptxas: install nvidia-cuda-nvcc")
    return found
