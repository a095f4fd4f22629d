"""The asking side: client, collector, and what is built on them. Never imports torch or an engine."""
