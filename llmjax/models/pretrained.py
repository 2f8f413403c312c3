"""A model that comes from a Hugging Face folder, for `model=FromPretrained(path)` inside an experiment."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from llmjax.config import InputError, diff
from llmjax.models.hf import COMPANIONS, open_config, open_hf
from llmjax.models.settings import canonical
from llmjax.nn.model import Model, Params, Wrapped


@dataclass(frozen=True)
class FromPretrained(Wrapped):
    """The model of a folder with config.json and safetensors, which training starts from.

    Where the folder's weights are quantised (GPTQ, AWQ, bitsandbytes in 4 bits), so are the model's, bit for bit.
    """

    path: str = ""
    """the folder, or where huggingface_hub is installed the id of a repository (`owner/name`)"""
    base: Model = field(default=Model(), kw_only=True)
    """its config, with dropout, rematerialisation and the like as you wish; where it is not given the folder's is read,
    and written down with the run"""

    def __post_init__(self) -> None:
        """Read the config that was not given; raises InputError where the folder is bad."""
        if self.base == Model():
            object.__setattr__(self, "base", open_config(folder_of(self.path))[2])

    def build(self) -> nn.Module:
        """The module of the folder's model."""
        return self.base.build()

    def boxed(self) -> Params:
        """The base's, whose parameters may be quantised."""
        return self.base.boxed()

    def init(self, key: PRNGKeyArray, given: Params | None = None) -> Params:
        """The folder's parameters: nothing is drawn."""
        return jax.tree.map(jnp.asarray, self.loaded(self.abstract())) if given is None else given

    def loaded(self, abstract: Params) -> Params:
        """The folder's parameters, each device's part read by its host; host arrays where no sharding is given.

        Of those that `abstract` leaves out nothing is read. Raises InputError where the folder holds another model than
        `base`.
        """
        folder = open_hf(folder_of(self.path))
        other = diff(canonical(folder.config), canonical(self.base))
        if other:
            place, theirs, ours = other[0]
            raise InputError(f"{folder.path} holds another model: {place} is {theirs} there and {ours} in the config")
        return folder._replace(config=self.base).params(abstract)


def folder_of(path: str) -> Path:
    """The local folder of a path or of a hub id; raises InputError where there is none."""
    if Path(path).expanduser().is_dir() and path:
        return Path(path).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"path={path!r}: there is no such folder: name one with config.json and safetensors")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(f"path={path!r}: there is no such folder, and huggingface_hub is not installed") from None
    try:
        return Path(snapshot_download(path, allow_patterns=["config.json", "*.safetensors*", *COMPANIONS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"path={path!r}: neither a folder here nor to be had from the hub: {error}") from None
