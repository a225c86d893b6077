"""Fine-tuning of pre-trained video models; imports pretrain, never the reverse."""
