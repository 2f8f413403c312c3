"""Data: sources, tokenizers, packing; a batch is a pure function of (seed, step).

Heavy libraries are imported when they are used.
"""

from llmjax.data.array_record import ArrayRecord
from llmjax.data.bpe import BPE
from llmjax.data.byte_tokenizer import Bytes
from llmjax.data.codec import Codec
from llmjax.data.concat_and_split import ConcatAndSplit
from llmjax.data.corpus import write_token_shards
from llmjax.data.dataset import Batches, Dataset
from llmjax.data.first_fit import FirstFit
from llmjax.data.hugging_face import HuggingFace
from llmjax.data.in_memory import InMemory
from llmjax.data.instructions import Instructions, Template
from llmjax.data.jsonl import JSONL
from llmjax.data.mixture import Mixture
from llmjax.data.packing import Packing
from llmjax.data.padded import Padded
from llmjax.data.parquet import Parquet
from llmjax.data.pipeline import Data, Pipeline
from llmjax.data.python_docs import PythonDocs
from llmjax.data.source import Source
from llmjax.data.synthetic import Synthetic
from llmjax.data.text_files import TextFiles
from llmjax.data.tfds import TFDS
from llmjax.data.token_shards import TokenShards
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_json import TokenizerJson

__all__ = [
    "BPE",
    "JSONL",
    "TFDS",
    "ArrayRecord",
    "Batches",
    "Bytes",
    "Codec",
    "ConcatAndSplit",
    "Data",
    "Dataset",
    "FirstFit",
    "HuggingFace",
    "InMemory",
    "Instructions",
    "Mixture",
    "Packing",
    "Padded",
    "Parquet",
    "Pipeline",
    "PythonDocs",
    "Source",
    "Synthetic",
    "Template",
    "TextFiles",
    "TokenShards",
    "Tokenizer",
    "TokenizerJson",
    "write_token_shards",
]
