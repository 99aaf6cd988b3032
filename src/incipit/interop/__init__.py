"""Prompts of other libraries: Hugging Face PEFT both ways, the official prompt-tuning .npy files inwards."""
