"""Language models behind an API: questions, replies, judgments."""
