"""Prompts of other libraries: Hugging Face PEFT both ways, the official .npy files inwards, vLLM outwards."""
