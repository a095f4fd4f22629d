"""Models behind one small interface. Knows the wire's vocabulary; no queue, no Redis."""
