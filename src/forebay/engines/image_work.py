"""Makes images that strangers sent ready for a model, and puts what it painted back, each in a forked, limited child.

It answers with bare pixels and with files that our own encoder has written, or with the reason why there is none; it opens
no address and no file, and no image is decoded in the process that talks to the server.

Standard input is a socket. An order on it is `>I`, the length of its head, sent with its descriptors, and then the head as
JSON. Each answer is `>BI`, verdict and length, and facts as JSON. Limits come as JSON in the first argument (`Settings`),
the id of the server's process in the second.

`{"order": "prepare", "images": count, "mask": bool, "needs_mask": bool, "edge_max", "edge_factor", "mask_plan": {"mode",
"specks", "dilation", "feather"}, "output": {"format", "compression", "backdrop", "size": [width, height] or null}}` comes
with the descriptors of the images, of the mask if there is one, and of an empty file, at its beginning, that can be written. Into that go the
images as RGB, the first in the size that is to be painted, and then the mask, if there is any: 255 where it is to be
painted. Facts: `{"size": [width, height], "images": [[width, height]...], "mask": bool}`.

`{"order": "finish", "images": 0 or 1, "mask", "needs_mask", "mask_plan", "output", "painted": [width, height], "preview":
bool}` comes with the descriptors of the first image, of the mask, of what was painted as RGB, and of an empty file. Into that
go the encoded picture and, if it is wanted, a preview (JPEG). Facts: `{"size": [width, height], "picture": bytes,
"preview": bytes}`. With no image at all, it is what was painted.

Without a mask of its own an image that `needs_mask` is edited where one can see through it, and else it is the engine's as a
whole. Facts of a refusal: `{"file": "image", "number": count from 0}` or `{"file": "mask"}`, or nothing. The verdicts:

0  OK
1  NOT_AN_IMAGE     no PNG, JPEG or WebP
2  BROKEN           damaged
3  TOO_MANY_PIXELS  above `pixels_max`, by its header
4  TOO_MANY_FRAMES  an animation
5  TOO_COSTLY       too much time or memory
6  TOO_NARROW       above `ratio_max`
7  NO_MASK          one is needed: none was sent, and nothing of the first image is transparent
8  MASK_SIZE        the mask has another size than the first image (both upright); facts have both: `"sizes": [[w, h], [w, h]]`
9  MASK_NO_ALPHA    in mode `alpha`: nothing of it can be transparent (send it with mask_mode=white)
10 MASK_EMPTY       nothing of it is transparent, or white
11 MASK_TOO_SMALL   fewer than `mask_pixels_min` pixels once it is cleaned up; facts: `"pixels"`
12 MASK_TOO_LARGE   covers more than `mask_coverage_max` of the image; facts: `"coverage"` 0 to 1
13 OTHER_SHAPE      `output.size` has another ratio of its sides than the first image
14 TOO_LONG_SIDE    the format cannot hold a side that long (WebP 16,383, JPEG 65,500)
15 NO_ROOM          the disk is full
"""

import contextlib
import json
import os
import socket
import struct
import sys
import warnings
from typing import TYPE_CHECKING, Any

from forebay.engines import fence

if TYPE_CHECKING:
    from forebay.engines.image_orders import Order, Settings

_HIGHEST = 15
_FILES_MAX = 64
_FILE_BYTES_MAX = 2**30  # of what is written
_HEAD_BYTES_MAX = 65_536
_FACTS_BYTES_MAX = 65_536


def main() -> None:
    """Serve until the server closes the socket or ends."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy takes address space for each when it is imported, which is below
    from forebay.engines.image_orders import Settings, warm_up

    settings = Settings(**json.loads(sys.argv[1]))
    libc = fence.begin(int(sys.argv[2]))
    warnings.simplefilter("ignore")  # of damaged words beside an image, which are not needed
    warm_up()
    server = socket.socket(fileno=0)
    with contextlib.suppress(OSError):  # the server has gone
        while _serve(server, settings, libc):
            pass


def _serve(server: socket.socket, settings: "Settings", libc: Any) -> bool:
    """Carry out one order; whether there was one."""
    from forebay.engines.image_orders import read_order

    length, descriptors, _, _ = socket.recv_fds(server, 4, _FILES_MAX)
    head = _received(server, struct.unpack(">I", length)[0]) if len(length) == 4 else b""
    if not head:
        return False
    try:
        verdict, facts = _run(read_order(head, list(descriptors)), settings, libc)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    server.sendall(struct.pack(">BI", verdict, len(facts)) + facts)
    return True


def _received(server: socket.socket, count: int) -> bytes:
    """So many bytes; none if there are not that many."""
    whole = bytearray()
    while len(whole) < min(count, _HEAD_BYTES_MAX):
        piece = server.recv(count - len(whole))
        if not piece:
            return b""
        whole += piece
    return bytes(whole)


def _run(order: "Order", settings: "Settings", libc: Any) -> tuple[int, bytes]:
    """Carry out one order in a child; this process only passes facts on."""
    cost = fence.Cost(settings.memory_bytes_max, settings.seconds_max, _FILE_BYTES_MAX)
    verdict, told = fence.told(
        lambda writer: _work(order, settings, writer), cost, libc, highest=_HIGHEST, bytes_max=_FACTS_BYTES_MAX
    )
    lines = told.split(b"\n")[:-1]  # what follows the last of them is not whole
    return verdict, lines[-1] if lines else b"{}"


def _work(order: "Order", settings: "Settings", writer: int) -> None:
    """What the child does: facts go to `writer`, the last line being those of the answer."""
    from forebay.engines.image_orders import carry_out

    carry_out(order, settings, lambda facts: fence.write(writer, json.dumps(facts).encode() + b"\n"))


if __name__ == "__main__":
    main()
