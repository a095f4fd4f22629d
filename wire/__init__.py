"""The contract that producers and workers share: chat vocabulary, events, errors, keys and ledger scripts."""
