"""The states of a model, as operators and callers see them.

It refuses to hold logic: who moves a model from one to the next is the supervisor.
"""

from enum import StrEnum


class ModelState(StrEnum):
    """absent -> pulling -> stopped -> waiting -> starting -> ready -> draining -> stopped, or failed with a reason."""

    ABSENT = "absent"  # its file is not on disk
    PULLING = "pulling"  # its file is being fetched
    STOPPED = "stopped"  # nobody has asked for it, or it was unloaded
    WAITING = "waiting"  # it waits for memory; its reason says who would have to leave
    STARTING = "starting"  # a process was launched and does not answer yet, or waits out its back-off
    READY = "ready"  # at least one replica takes requests
    DRAINING = "draining"  # it finishes what it runs and takes nothing new
    ASLEEP = "asleep"  # its process is there and has given the memory of its device to another
    FAILED = "failed"  # it cannot be pulled or started; it is tried again at `retry_at`
