"""Every name in Redis, spelled here and nowhere else. (The Lua scripts build the same names from the prefix.)

All begin with ``tokenfleet:<fleet>:`` but for the Celery queue lists and ``celery-task-meta-<job>``.

| name                 | type    | what                                                         | writer            | ends          |
|----------------------|---------|--------------------------------------------------------------|-------------------|---------------|
| job:<id>             | hash    | the ledger entry                                             | all scripts       | retention     |
| log:<id>             | stream  | the token log, ids ``<seq>-0``, one field ``e``              | submit, append, … | retention     |
| live:<id>            | channel | the same events live: ``{"seq":first,"events":[…]}``         | submit, append, … |               |
| queue:<queue>        | zset    | jobs waiting to be claimed; score = lane, then order         | submit, claim, …  | when empty    |
| order:<queue>        | hash    | order counters and who was claimed when (lost-message rule)  | submit, claim     | never         |
| due                  | zset    | jobs by the time their message is to be sent (again)         | submit, claim, …  | when empty    |
| deadlines            | zset    | all jobs that have not ended, by the next deadline           | submit, claim, …  | when empty    |
| workers              | zset    | worker id by the end of its lease (Redis ms)                 | beat, reap        | when empty    |
| worker:<wid>         | hash    | what a worker says of itself                                 | beat              | with worker   |
| jobs:<wid>           | set     | jobs the worker runs                                         | claim, …          | with worker   |
| held:<wid>           | set     | jobs whose message a worker holds until it has room          | hold              | with worker   |
| ctl:<wid>            | channel | orders to a worker: ``cancel <id>``, ``fenced``, ``ask <n>`` | cancel, reap      |               |
| ask:<nonce>          | string  | a question to a worker's tokenizer (`wire/asks.py`)          | gateway           | taken, 30 s   |
| reply:<nonce>        | list    | its answer                                                   | worker            | taken, 30 s   |
| sync                 | channel | empty; sent to learn what the replicas have (`Ledger`)       | a reader          |               |
| models               | hash    | served models: name → JSON                                   | register          | never         |
| queues               | set     | all queues                                                   | register          | never         |
| dead                 | zset    | dead letters by time                                         | reap              | retention     |
| outbox               | set     | ended jobs whose Celery links are still to be sent           | append, cancel, … | when empty    |
| tenant:<tenant>      | zset    | the tenant's jobs that have not ended, by their deadline     | submit, finish    | when empty    |
| limits               | hash    | tenant → its limits as JSON                                  | command line      | never         |
| rate:<tenant>        | hash    | the tenant's buckets of requests and tokens                  | rate, finish      | once full     |
| webhook_secrets      | hash    | tenant → what its webhooks are signed with                   | command line      | never         |
| hook:<id>            | hash    | a webhook to be delivered: where, for whom, attempts so far  | finish, gateways  | 3 days        |
| hooks                | zset    | ids of such, by when they are next to be tried               | finish, gateways  | when empty    |
| media:<scope>:<sha>  | hash    | a medium: ``bytes`` (size), ``data`` or ``file`` (its name)   | media_put         | its jobs' ends |
| media-jobs:<s>:<sha> | zset    | who needs it (job ids, ``upload``, ``kept``), until when     | submit, claim, …  | with it       |
| file:<id>            | string  | a stored file's record as JSON; its bytes are in the storage | file              | expiry        |
| files:<tenant>       | zset    | the tenant's files by time                                   | file              | when empty    |
| file_ends            | zset    | files that expire, by when                                   | file              | when empty    |
| file_bytes           | hash    | tenant → bytes stored                                        | file              | when empty    |
| batch:<id>           | hash    | a batch: its state, its driver's lease, how far it is        | batch             | retention     |
| batches:<tenant>     | zset    | the tenant's batches by time                                 | batch, gateways   | when empty    |
| batches_active       | zset    | batches that have not ended, by time                         | batch             | when empty    |
| meta                 | hash    | incarnation, last reap and burial, memory sample             | reap, register    | never         |
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import IntEnum

_ID = re.compile(r"^[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$")


class Priority(IntEnum):
    """A lane of a queue; also kombu's priority step (lower is served first)."""

    interactive = 0
    normal = 3
    batch = 6


def new_id() -> str:
    """128 random bits, in the form Celery uses for task ids."""
    h = secrets.token_hex(16)
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def is_id(text: str) -> bool:
    """Whether ``text`` can be a job's id: nothing else ever becomes part of a key."""
    return bool(_ID.match(text))


def media_entry(tenant: str, ref: str) -> str:
    """The end of a medium's key: ``<scope>:<sha256>``. Tenants never meet, and no name of one is part of a key."""
    return f"{hashlib.sha256(tenant.encode()).hexdigest()[:16]}:{ref}"


def slug(model: str) -> str:
    """A model's name as it stands in its queue's: readable, safe, and distinct (6 hex of its sha256)."""
    readable = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of one fleet."""

    fleet: str = "default"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.fleet):
            raise ValueError(f"fleet name {self.fleet!r}: use 1 to 64 letters, digits, '_', '.' or '-'")

    @property
    def prefix(self) -> str:
        return f"tokenfleet:{self.fleet}:"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def log(self, job_id: str) -> str:
        return f"{self.prefix}log:{job_id}"

    def live(self, job_id: str) -> str:
        return f"{self.prefix}live:{job_id}"

    def media(self, entry: str) -> str:
        """``entry`` is a `media_entry`."""
        return f"{self.prefix}media:{entry}"

    def control(self, worker_id: str) -> str:
        return f"{self.prefix}ctl:{worker_id}"

    def ask(self, nonce: str) -> str:
        return f"{self.prefix}ask:{nonce}"

    def reply(self, nonce: str) -> str:
        return f"{self.prefix}reply:{nonce}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}worker:{worker_id}"

    def waiting(self, model: str) -> str:
        return f"{self.prefix}queue:{self.queue(model)}"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    @property
    def models(self) -> str:
        return f"{self.prefix}models"

    @property
    def meta(self) -> str:
        return f"{self.prefix}meta"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    @property
    def limits(self) -> str:
        return f"{self.prefix}limits"

    @property
    def webhook_secrets(self) -> str:
        return f"{self.prefix}webhook_secrets"

    def file(self, file_id: str) -> str:
        return f"{self.prefix}file:{file_id}"

    def files(self, tenant: str) -> str:
        return f"{self.prefix}files:{tenant}"

    @property
    def file_ends(self) -> str:
        return f"{self.prefix}file_ends"

    def batch(self, batch_id: str) -> str:
        return f"{self.prefix}batch:{batch_id}"

    def batches(self, tenant: str) -> str:
        return f"{self.prefix}batches:{tenant}"

    @property
    def hooks(self) -> str:
        return f"{self.prefix}hooks"

    def hook(self, ended_id: str) -> str:
        return f"{self.prefix}hook:{ended_id}"

    @property
    def unacked(self) -> str:
        """kombu's own books of delivered, unacknowledged messages (hash; ``<this>_index`` is a zset)."""
        return f"{self.prefix}unacked"

    def queue(self, model: str) -> str:
        """The Celery queue of a served model."""
        return f"tokenfleet.{self.fleet}.{slug(model)}"
