"""Scoring jobs, cut into passes that chats can go on between."""

from __future__ import annotations

from tokenfleet.engines.transformers_engine.batch import PromptPass
from tokenfleet.engines.transformers_engine.loading import LoadedModel


class ScoreWork:
    """Texts to score, a few at a time, so that chats go on in between."""

    def __init__(self, texts_ids: list[tuple[int, ...]], adapter: str | None, receiver: object) -> None:
        self.receiver = receiver
        self._texts_ids = texts_ids
        self._adapter = adapter
        self._scores = [0.0] * len(texts_ids)
        self._left = sorted(range(len(texts_ids)), key=lambda place: len(texts_ids[place]), reverse=True)
        self._taken: list[int] = []
        self._pass: PromptPass | None = None

    def run(self, model: LoadedModel, chunk_tokens: int) -> list[float] | None:
        """One forward pass; all scores after the last."""
        if self._pass is None:
            self._take(chunk_tokens)
            prompts = [(self._texts_ids[place], self._adapter) for place in self._taken]
            self._pass = PromptPass(prompts, model.layers, chunk_tokens)
        rewards = self._pass.run(model.reward)
        if rewards is None:
            return None
        for place, reward in zip(self._taken, rewards.tolist(), strict=True):
            self._scores[place] = reward
        self._pass = None
        return None if self._left else self._scores

    def _take(self, chunk_tokens: int) -> None:
        """The next texts, of similar length, as many as a chunk holds."""
        longest = len(self._texts_ids[self._left[-1]])
        self._taken = []
        while self._left:
            length = max(longest, len(self._texts_ids[self._left[-1]]))
            if self._taken and length * (len(self._taken) + 1) > chunk_tokens:
                break
            longest = length
            self._taken.append(self._left.pop())
