"""Parameter-efficient tuning: small trainable parts on a frozen ViT, their files, several of them on one backbone."""
