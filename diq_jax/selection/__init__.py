"""Which examples to keep: orders, methods, hygiene, and what is handed on."""
