"""Chat templates: named ones as data (`schema`), the model's own in a sandbox (`own`), and what both need."""
