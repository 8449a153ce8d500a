"""Meters for tests that are not about quotas."""

from forebay.clock import Clock
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Meter
from forebay.store.database import Database
from forebay.store.usage import UsageStore


def job_meter(database: Database, clock: Clock) -> JobMeter:
    """One that knows of no quota."""
    return JobMeter(Meter((), clock), UsageStore(database, clock))
