"""``toca-fx bench``: time saved against work saved, beside ``torch.compile(model)`` with fused
attention, and beside other caches.
"""
