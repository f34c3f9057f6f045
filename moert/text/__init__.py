"""Text to tokens and back, and conversations as the prompts that a model expects; knows no model and no store."""
