"""Run requests: ``perform`` under any RQ worker, ``Worker`` with leases renewed by the parent."""

from rqarm.worker.equipment import use_handlers
from rqarm.worker.loading import load_handlers
from rqarm.worker.rqjob import perform
from rqarm.worker.rqworker import Worker

__all__ = ["Worker", "load_handlers", "perform", "use_handlers"]
