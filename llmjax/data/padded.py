"""One document a row, padded on the right."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from llmjax.data.packing import Packing, PieceTable, Plan, document_pieces


@dataclass(frozen=True)
class Padded(Packing):
    """A row holds one document and then padding, which no loss sees; a longer document goes on in the next row."""

    truncate: bool = False
    """Leave out what does not fit in a document's first row (in training only: evaluation counts every token)."""

    def plan(self, starts: Int64[np.ndarray, "documents+1"], length: int, evaluation: bool) -> Plan:
        """One piece a row."""
        pieces = document_pieces(starts, length)
        if self.truncate and not evaluation:
            pieces = pieces[np.isin(pieces[:, 0], starts[:-1])]
        return PieceTable(np.arange(len(pieces) + 1), pieces)
