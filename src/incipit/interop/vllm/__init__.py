"""vLLM: prompts of a causal model as a bundle for `vllm serve`. bundle.py writes it, incipit_prompts/ is what it holds."""

from incipit.interop.vllm.bundle import command, write

__all__ = ["command", "write"]
