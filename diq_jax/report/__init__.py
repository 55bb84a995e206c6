"""The page, pictures and explorer of a run."""
