"""One small model whose attention, MLP, residuals and blocks are spelled in many ways."""
