"""Training on what was selected: SFT, DPO, and the states of a run."""
