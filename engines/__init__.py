"""Models behind one small interface. Knows the wire's vocabulary; no queue, no Redis.

What engines share stands beside their folders: `base` (the interface), `options`, `checks` (what is refused), `support`
(which parameter is), `folders` (what is read of a model's files; fingerprints), `stopping`, `grammar`, `rewards`,
`rope`, `mailbox` (tokens on their way to a reader), `warming`, `lifeline` (child processes leave with their parent);
above them `registry`, `prompts`, `generation` and the tokenizers.
"""
