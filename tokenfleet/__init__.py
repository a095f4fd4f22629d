"""A fleet of LLM inference workers behind a message queue."""
