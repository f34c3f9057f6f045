"""Speed, quality and this machine, measured; nothing here decides what a run does."""
