"""Who is called, on which step, with which memory."""
