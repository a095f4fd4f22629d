"""The GPU side: Celery app and task, asyncio pool, warm engine, publisher, leases, reaper, supervisor."""
