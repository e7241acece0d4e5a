"""Training: SFT, QA and preferences on TRL's trainers."""
