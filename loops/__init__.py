"""The commands: one file is one stage is one command; loops import captioner, never each other."""
