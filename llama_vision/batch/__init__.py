"""Many prompts from a file or a folder, their answers in a file: resumed where it was left."""
