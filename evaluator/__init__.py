"""The local evaluator: how good a separation is, by the challenge's own measure."""
