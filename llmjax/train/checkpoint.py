"""Checkpoints: written by orbax in the background, complete or absent, and trusted only after their hashes agree.

    checkpoints/00000200/arrays/params/   orbax, nested like the parameters that train, loadable alone
                         arrays/frozen/   orbax, the parameters that do not, as {path: array}; where there are any
                         arrays/state/    orbax, the rest of the state as {path: array}
                         meta.json        step, held-out loss, the loop's own numbers, shapes and dtypes of all arrays
                         manifest.json    SHA-256 of every file above, written last

A checkpoint is written under a hidden name and renamed once its manifest and everything in it are on the disk, so that
a name made of digits stands for a complete checkpoint. Its hashes are verified before it is read, because
orbax restores flipped bits without a word. Of several processes each writes what its devices hold, and the first one
does everything else.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from llmjax.config import InputError
from llmjax.nn.model import Params
from llmjax.parallel import hosts
from llmjax.train.errors import RunError, disk_full
from llmjax.train.state import State, by_path, path_of

FORMAT = "llmjax-checkpoint-1"
FOLDER = "checkpoints"
META, MANIFEST, ARRAYS = "meta.json", "manifest.json", "arrays"
HIDDEN = ".unfinished-"

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, verified when it was found."""

    path: Path
    step: int
    """Updates made before it was written."""
    val_loss: float | None
    """Held-out loss of its parameters, where it was measured."""
    progress: dict[str, Any]
    """The loop's own numbers."""
    arrays: dict[str, dict[str, Any]]
    """Shape and dtype of every array, by item (params, frozen, state) and path."""

    def params(self, abstract: Params) -> Params:
        """The trained parameters, placed as `abstract` (shape structs with shardings) says, on any number of devices.

        Raises InputError where a parameter is missing or has another shape or dtype.
        """
        self._check("params", by_path(abstract), "parameter")
        return self._restore({"params": abstract})["params"]

    def state(self, abstract: State) -> State:
        """The whole state, placed as `abstract` says. Raises InputError as `params` does."""
        params, frozen = self.params(abstract.params), self.frozen(abstract.frozen)
        rest = self._by_path("state", abstract._replace(params=None, frozen=None), "array")
        return rest._replace(params=params, frozen=frozen)

    def frozen(self, abstract: Params) -> Params:
        """The parameters that do not train, placed as `abstract` says. Raises InputError as `params` does."""
        return self._by_path("frozen", abstract, "parameter")

    def _by_path(self, item: str, abstract: PyTree, noun: str) -> Any:
        """The tree like `abstract` that is kept as {path: array}."""
        wanted = by_path(abstract)
        self._check(item, wanted, noun)
        if not wanted:
            return abstract
        restored = self._restore({item: wanted})[item]
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in _paths(abstract)])

    def _check(self, item: str, wanted: dict[str, Any], noun: str) -> None:
        saved = self.arrays.get(item, {})
        for path in sorted(wanted.keys() | saved.keys()):
            if path not in saved:
                raise InputError(f"checkpoint {self.path} lacks {noun} {path}: it is of another experiment")
            if path not in wanted:
                raise InputError(f"checkpoint {self.path} holds {noun} {path}, which this experiment has not")
            if saved[path] != _kind(wanted[path]):
                mine, theirs = (f"{kind['dtype']}{kind['shape']}" for kind in (_kind(wanted[path]), saved[path]))
                raise InputError(f"checkpoint {self.path}: {noun} {path} is {theirs} there and {mine} here")

    def _restore(self, targets: dict[str, PyTree]) -> Any:
        import orbax.checkpoint as ocp

        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.path / ARRAYS, args=ocp.args.Composite(**items))


def steps(run_dir: str | Path) -> list[int]:
    """Steps of the complete checkpoints of a run, damaged ones included, in order."""
    folder = Path(run_dir) / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def newest(run_dir: str | Path, warn: Warn) -> Checkpoint | None:
    """The newest checkpoint that is intact; `warn` gets a line for each damaged one. None where there is none."""
    return next(_intact(run_dir, warn), None)


def best(run_dir: str | Path, warn: Warn) -> Checkpoint | None:
    """The intact checkpoint of lowest held-out loss; the newest where none was measured; None where there is none."""
    intact = list(_intact(run_dir, warn))
    measured = [checkpoint for checkpoint in intact if checkpoint.val_loss is not None]
    return min(measured, key=lambda c: c.val_loss, default=intact[0] if intact else None)


def _intact(run_dir: str | Path, warn: Warn) -> Iterator[Checkpoint]:
    for step in reversed(steps(run_dir)):
        path = place(run_dir, step)
        try:
            yield verified(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"checkpoint {path} is damaged ({error}): using the one before it")


def place(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return Path(run_dir).resolve() / FOLDER / f"{step:08d}"


def verified(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte of it hashed. Raises OSError or ValueError where it is damaged."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name, digest in manifest.items():
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} has changed since it was written")
    if META not in manifest:
        raise ValueError(f"its manifest lacks {META}")
    return read(path)


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which another process has verified. Raises OSError or ValueError where it is none."""
    meta = json.loads((path / META).read_text())
    if meta.get("format") != FORMAT:
        raise ValueError(f"the format is {meta.get('format')!r}, not {FORMAT!r}")
    return Checkpoint(path, meta["step"], meta["val_loss"], meta["progress"], meta["arrays"])


class Writer:
    """Writes the checkpoints of a run in the background, one at a time, and deletes those that are no longer kept."""

    def __init__(self, run_dir: str | Path, keep_last: int, keep_best: int) -> None:
        """Remove what an earlier process left unfinished; the caller holds the run's lock."""
        self._run_dir = Path(run_dir)
        self._folder = self._run_dir.resolve() / FOLDER
        self._keep_last, self._keep_best = keep_last, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._orbax: Any = None
        if hosts.first():
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f"{HIDDEN}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints after step `after` to `damaged-<step>`: the run continues from before them."""
        for step in steps(self._run_dir):
            if step > after:
                path = place(self._run_dir, step)
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def save(self, step: int, state: State, progress: dict[str, Any], val_loss: float | None) -> None:
        """Copy the state to the host and write it in the background; on return the state may be donated.

        Waits for the save before, and raises RunError if it failed (a full disk).
        """
        self.wait()
        import orbax.checkpoint as ocp

        if self._orbax is None:
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        target = place(self._run_dir, step)
        partial = self._folder / f"{HIDDEN}{target.name}"
        items = {"params": state.params, "state": by_path(state._replace(params=None, frozen=None))}
        items |= {"frozen": by_path(state.frozen)} if state.frozen else {}
        meta = {
            "format": FORMAT,
            "step": step,
            "val_loss": val_loss,
            "progress": progress,
            "arrays": {item: {path: _kind(x) for path, x in by_path(tree).items()} for item, tree in items.items()},
        }
        saved = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        with self._failing_clearly(partial):
            hosts.on_first(lambda: self._begin(partial, sum(x.nbytes for x in jax.tree.leaves(state))))
            self._orbax.save(partial / ARRAYS, args=ocp.args.Composite(**saved))
        self._thread = threading.Thread(target=self._finish, args=(partial, target, meta), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress. Raises RunError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what the save in the background has failed with so far, if anything."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the save in progress and free orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _begin(self, partial: Path, size: int) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        _need_space(self._folder, size)
        partial.mkdir()

    def _finish(self, partial: Path, target: Path, meta: dict[str, Any]) -> None:
        try:
            with self._failing_clearly(partial):
                with _quiet():
                    self._orbax.wait_until_finished()  # in the first process: until all of them have written
                if hosts.first():
                    seal(partial, meta)
                    _remove(target)
                    partial.rename(target)
                    _sync(target.parent)
                    self._rotate()
        except BaseException as error:
            self._error = error

    @contextlib.contextmanager
    def _failing_clearly(self, partial: Path) -> Iterator[None]:
        """A full disk becomes one line; whatever fails, nothing half-written stays."""
        try:
            yield
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not disk_full(error):
                raise
            kept = steps(self._run_dir)
            last = f"the last complete checkpoint is step {kept[-1]}" if kept else "there is no complete one yet"
            raise RunError(
                f"the disk is full: cannot write a checkpoint to {self._folder} ({last}); free space, then run again"
            ) from error

    def _rotate(self) -> None:
        """Delete all but the newest and the best."""
        existing = steps(self._run_dir)
        losses = {step: _val_loss(place(self._run_dir, step)) for step in existing}
        measured = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        kept = set(existing[-self._keep_last :]) | {step for _, step in measured[: self._keep_best]}
        for step in set(existing) - kept:
            _remove(place(self._run_dir, step))


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, then the manifest over all files in `folder`, and see everything to the disk."""
    (folder / META).write_text(json.dumps(meta, indent=1))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _need_space(folder: Path, size: int) -> None:
    """Raise OSError where the disk has no room for `size` bytes: before orbax finds out, which is noisy."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"a checkpoint takes {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's threads from printing the error that is about to be raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _val_loss(path: Path) -> float | None:
    try:
        return json.loads((path / META).read_text())["val_loss"]
    except (OSError, ValueError, KeyError):
        return None


def _remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no part of one is ever taken for a whole."""
    if path.exists():
        doomed = path.with_name(f"{HIDDEN}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _paths(tree: PyTree) -> list[str]:
    """The paths of the leaves in the order of flattening."""
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """See a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
