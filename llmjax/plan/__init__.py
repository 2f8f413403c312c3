"""What a run will take, before it takes it: on one device from shapes alone, on a pod from the real compiler."""

from llmjax.plan.one_device import Parameter, activation_bytes, arithmetic, memory, microbatch, nbytes, parameters

__all__ = ["Parameter", "activation_bytes", "arithmetic", "memory", "microbatch", "nbytes", "parameters"]
