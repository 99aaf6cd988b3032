"""vLLM: prompts of a causal model as a bundle. bundle.py writes it, incipit_prompts/ is the middleware in it."""

from incipit.interop.vllm.bundle import command, write

__all__ = ["command", "write"]
