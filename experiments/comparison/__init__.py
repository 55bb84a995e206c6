"""What compare_selection.py and the lab share: cells, their training, and what they say."""
