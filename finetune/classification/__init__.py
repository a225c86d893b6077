"""Video classification: labels, augmentation, evaluation, predictions."""
