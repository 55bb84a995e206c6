"""How good models are at the test questions, and how sure that is."""
