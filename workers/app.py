"""``celery -A workers.app worker``: one app object, imported as ``workers.app`` or as ``tokenfleet.workers.app``."""

from tokenfleet.workers.celery_app import app

__all__ = ["app"]
