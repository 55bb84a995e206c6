"""The jobs of `diq NAME`, a module each: flags, questions and prints live here."""
