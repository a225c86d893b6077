"""Tasks with labels: one file each, named by the recipe's `objective.name`; as pretrain/objectives/base.py asks."""
