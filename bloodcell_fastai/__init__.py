"""Fine-tune MaxViT-nano on blood-cell photographs with fastai, and know how good it really is."""
