"""The local evaluator: scores separated stems with the challenge's metrics and protocol."""
