"""Celery's settings of a tokenfleet worker: ``celery -A workers.app worker`` reads this file.

What differs between fleets (Redis' URL, the served model, slots, ...) comes from ``TOKENFLEET_*`` (docs/settings.md).
Why each of these is as it is: docs/operations.md.
"""

from kombu.entity import Queue

from tokenfleet.wire import urls
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.keys import Priority
from tokenfleet.workers.settings import load_settings
from tokenfleet.workers.worker_state import report_state

try:
    tokenfleet_settings = load_settings()
except ConfigurationError as error:
    report_state("failed", error=error)  # a supervisor need not try again
    raise SystemExit(f"error [{error.code}]: {error}") from None
_address = urls.parse(tokenfleet_settings.redis_url)
_queue = tokenfleet_settings.keys.queue(tokenfleet_settings.model)

broker_url = result_backend = _address.for_celery()
broker_transport_options = {
    **_address.celery_transport_options(),
    "priority_steps": [int(priority) for priority in Priority],
    "queue_order_strategy": "priority",
    # The ledger finds lost jobs within seconds; kombu's own redelivery would only run jobs twice.
    "visibility_timeout": 7 * 86400,
    "unacked_key": tokenfleet_settings.keys.unacked,
    "unacked_index_key": f"{tokenfleet_settings.keys.unacked}_index",
    "unacked_mutex_key": f"{tokenfleet_settings.keys.unacked}_mutex",
    "health_check_interval": 5,
    "socket_keepalive": True,
}
result_backend_transport_options = _address.celery_transport_options()
broker_connection_retry_on_startup = True
broker_connection_max_retries = None

task_queues = (Queue(_queue, routing_key=_queue),)  # type: ignore[no-untyped-call]
# What follows a chat in a user's chain goes where Celery sends tasks by default, or where the signature says.
task_default_queue = "celery"

worker_pool = "tokenfleet.workers.pool:AsyncioPool"
worker_concurrency = tokenfleet_settings.concurrency
worker_prefetch_multiplier = 1
worker_cancel_long_running_tasks_on_connection_loss = False
worker_send_task_events = True
worker_proc_alive_timeout = 600
task_acks_late = True
task_reject_on_worker_lost = False
# A task's return value would land in events and logs; the finish script writes what AsyncResult reads.
task_ignore_result = True
task_store_errors_even_if_ignored = False

accept_content = task_accept_content = ["json"]
task_serializer = result_serializer = "json"
enable_utc = True
