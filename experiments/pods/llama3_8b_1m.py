"""Llama-3-8B shapes at length 1,048,576 on a pod: 64 chips of v5p, every row split over 16 of them.

What:   32 layers of width 4096 (8.03B parameters), rotary base as published, on your own token shards, bfloat16 compute
        on float32 parameters, AdamW, all recomputed but the blocks' inputs and attention's results. context=16: each
        chip has 65,536 tokens of a row, whose keys and values go around a ring while it works on those at hand. fsdp=4
        splits the parameters, and the context's chips share most of them: their hidden width and query heads (rules).
Cost:   estimated, no pod has run it (libtpu 0.0.42; efficiencies in llmjax/plan/chips.py). MFU counts half the pairs of
        causal attention; MaxText's tables count all of them.
        llama3_8b_1m.py --target=v5p:4x4x4
            72.5 GiB of 95.7 a chip, 241.3 s a step of 4,194,304 tokens, MFU 51.5 % (all pairs 100.3 %, of which half
            are computed): attention 229 s, matrix products 9.3 s, bound by HBM 2.0 s, collectives 1.0 s of 1.7 s, the
            rest behind the attention. Without the rules it is 97.1 GiB, with remat="full" too 72.7 GiB and 307 s.
            Compiled in 269 s on a shared core.
Expect: not known: no pod has trained it yet.
Run:    llmjax train experiments/pods/llama3_8b_1m.py --data.source.path=tokens/ --run-dir=runs/llama3_8b_1m
"""

from dataclasses import replace

from llmjax.data import Data, TokenizerJson, TokenShards
from llmjax.experiment import Experiment
from llmjax.models.llama import llama3
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """64 chips of v5p: 4 rows, 4,194,304 tokens an update."""
    return Experiment(
        name="llama3_8b_1m",
        model=replace(llama3("8B"), remat="attention", unroll=1),
        data=Data(
            source=TokenShards(path="tokens"),
            tokenizer=TokenizerJson(path="tokens/tokenizer.json"),
            length=2**20,
            batch_size=4,
        ),
        objective=NextToken(chunk=2048, z_loss=1e-4),
        optimizer=AdamW(schedule=Cosine(learning_rate=3e-5, warmup=100), weight_decay=0.1, b2=0.95),
        train=Train(
            steps=1000,
            precision=Precision(compute="bfloat16"),
            eval_every=100,
            eval_batches=4,
            checkpoint_every=100,
        ),
        mesh=MeshConfig(fsdp=4, context=16, rules=(("d_ff", "context"), ("heads", "context"))),
    )
