"""Adapters without what only their training needs: networks that write a prompt or a prefix are run once."""

import re
from dataclasses import replace

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS
from llmjax.nn.model import Params, flat, unflat


def folded(model: Adapted, params: Params) -> tuple[Adapted, Params]:
    """The same function with `PTuning` as `PromptTuning`, and `PrefixTuning` as its prefix alone."""
    leaves, adapters = flat(params), []
    for adapter in model.adapters:
        place = re.compile(rf"((?:.*/)?{ADAPTERS}/{re.escape(adapter.name)})/(.+)")
        found = [(match, x) for path, x in leaves.items() if (match := place.fullmatch(path))]
        kept = adapter
        for node in sorted({match[1] for match, _ in found}):
            own = unflat({match[2]: x for match, x in found if match[1] == node})
            kept, mine = adapter.folded(own)
            leaves = {path: x for path, x in leaves.items() if not path.startswith(f"{node}/")}
            leaves |= {f"{node}/{path}": x for path, x in flat(mine).items()}
        adapters.append(kept)
    return replace(model, adapters=tuple(adapters)), unflat(leaves)
