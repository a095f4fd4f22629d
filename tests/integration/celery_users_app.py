"""A Celery user's own app: his tasks, on his own worker and queue, around tokenfleet's."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("users", broker=os.environ.get("USERS_URL"), backend=os.environ.get("USERS_URL"))


@app.task(name="users.ask")
def ask(topic: str) -> str:
    return f"Tell me about {topic}."


@app.task(name="users.keep")
def keep(answer: dict) -> dict:
    return {"kept": answer["choices"][0]["text"], "n": 1}


@app.task(name="users.keep_all")
def keep_all(answers: list[dict]) -> list[str]:
    return [answer["choices"][0]["text"] for answer in answers]


@app.task(name="users.count")
def count(_: object, name: str) -> None:
    app.backend.client.incr(f"users:{name}")


@app.task(name="users.failed")
def failed(job_id: str, name: str) -> None:
    app.backend.client.rpush(f"users:{name}", job_id)
