"""The named moments between which work may be cut in two, so that a crash at each of them can be rehearsed.

It refuses to do anything unless `rehearsal.kill_at` names a point: then the process kills itself there, as a power cut
would, without unwinding anything.
"""

import os
import signal

NAMES = {
    "file.blob_written": "The bytes of a file are stored; its row is not ready yet.",
    "file.row_committed": "A file is ready; its creator has no answer yet.",
    "upload.joined": "The parts of an upload are joined; its file is not ready yet.",
    "batch.created": "A batch and its job are committed; its creator has no answer yet.",
    "batch.checked": "The input file is checked; no chunk is committed yet.",
    "batch.chunks_committed": "The chunks of a batch are committed.",
    "chunk.leased": "A chunk is leased; none of its lines has run.",
    "chunk.segment_written": "The bytes of a segment are stored; its row is not committed.",
    "chunk.segment_committed": "A segment and the states of its lines are committed.",
    "chunk.finished": "Every line of a chunk is written; the chunk is not settled.",
    "chunk.settled": "A chunk is settled.",
    "batch.joined": "The output files are stored; the batch is not settled.",
    "batch.settled": "A batch is settled and its webhooks are enqueued; the segments are still there.",
    "batch.swept": "The segments of a settled batch are removed.",
    "transcription.media_stored": "The recording of a transcription is stored; its job is not committed.",
    "transcription.created": "A transcription and its job are committed; its creator has no answer yet.",
    "transcription.stretch_kept": "A stretch of a recording is finished and committed.",
    "transcription.settled": "A transcription is settled; its recording is still there.",
    "image.media_stored": "What came with a request for pictures is stored; its job is not committed.",
    "image.created": "A request for pictures and its job are committed; its creator has no answer yet.",
    "image.picture_stored": "The files of a finished picture are stored; the picture is not kept yet.",
    "image.picture_kept": "A finished picture is kept, and is not painted again.",
    "image.finished": "Every picture of a job is kept; the job is not settled.",
    "image.delivered": "The results of a pushed message are in its store; the job is not settled.",
    "intake.taken": "A pushed message and its job are committed; its platform has no answer yet.",
    "image.settled": "An image job is settled and its files are there; what came with it still is.",
    "usage.journaled": "What an answer used is in the journal; the end of the answer is not sent.",
    "usage.folded": "What a journal holds is added up in the database; the process does not know it yet.",
    "usage.left_folded": "The journal of a dead process is added up; it is not removed yet.",
    "usage.journal_removed": "A journal is removed; the database does not know it yet.",
    "webhook.sent": "A receiver has answered; the delivery is not settled.",
}

_armed: list[tuple[str, int]] = []
_passed: dict[str, int] = {}


def arm(point: str | None) -> str | None:
    """Choose the point, `name` or `name:n`; None means none. The reason if there is no such point."""
    _armed.clear()
    _passed.clear()
    if point is None:
        return None
    name, _, count = point.partition(":")
    if name not in NAMES or not (count or "1").isdigit():
        return f"`{point}` is no commit point. They are: {', '.join(NAMES)}."
    _armed.append((name, max(1, int(count or "1"))))
    return None


def reach(name: str) -> None:
    """Pass the point `name`; the process ends here if this is the one that was chosen."""
    assert name in NAMES, name
    if not _armed or _armed[0][0] != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == _armed[0][1]:
        os.kill(os.getpid(), signal.SIGKILL)
