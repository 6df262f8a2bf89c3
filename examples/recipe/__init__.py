"""What the example scripts share: data, configuration and the training engine."""
