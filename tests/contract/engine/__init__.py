"""The contract of all engines: one suite, each test with every engine."""
