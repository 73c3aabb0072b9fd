"""``toca-fx bench``: time saved against work saved, compared with ``torch.compile(model)``."""
