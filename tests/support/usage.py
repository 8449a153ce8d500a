"""Meters for tests that are not about quotas, and records as other versions write them."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from forebay.clock import Clock
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Meter
from forebay.store.database import Database
from forebay.store.usage import UsageStore


def job_meter(database: Database, clock: Clock) -> JobMeter:
    """One that knows of no quota."""
    return JobMeter(Meter((), clock), UsageStore(database, clock))


def append_record(journal: Path, *values: Any) -> None:
    """Append a record of any values to a journal."""
    record = json.dumps(values).encode()
    with journal.open("ab") as file:
        file.write(struct.pack("<II", len(record), zlib.crc32(record)) + record)
