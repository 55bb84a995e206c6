"""The parts of selection_lab.py."""
