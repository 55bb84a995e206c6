"""How much an example lowers the targets' loss: directions, engines, scores."""
