"""What models have made of contents, kept by content and project, the one used longest ago forgotten first.

It refuses to hold more bytes than it may.
"""

from collections import OrderedDict

from forebay.dialects.items import Item

ENTRY_BYTES = 320  # what an entry costs beside its value


class ItemCache:
    """Items by digest. Used on one event loop; nothing here awaits."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes = 0
        self._bytes_max = bytes_max
        self._items: OrderedDict[bytes, Item] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, digest: bytes) -> Item | None:
        """The item, if it is kept."""
        item = self._items.get(digest)
        if item is not None:
            self._items.move_to_end(digest)
        return item

    def put(self, digest: bytes, item: Item) -> None:
        """Keep `item`, as long as there is room for it."""
        before = self._items.pop(digest, None)
        if before is not None:
            self.bytes -= len(before.value) + ENTRY_BYTES
        size = len(item.value) + ENTRY_BYTES
        if size > self._bytes_max:
            return
        self._items[digest] = item
        self.bytes += size
        while self.bytes > self._bytes_max:
            _, oldest = self._items.popitem(last=False)
            self.bytes -= len(oldest.value) + ENTRY_BYTES
