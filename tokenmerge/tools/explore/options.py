"""Options of `tokenmerge explore`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenmerge.tools.common import DeviceOptions, MergeOptions
from tokenmerge.tools.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreOptions(DeviceOptions, MergeOptions):
    """Options of `tokenmerge explore`.

    Attributes:
        data: folder of files that the page offers; `None` offers none.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
    """

    data: Path | None = option(
        None, "folder of files that the page offers", "data", "--data", "--data-dir", metavar="DIR"
    )
    host: str = option("127.0.0.1", "address to listen on", "output")
    port: int = option(8765, "port to listen on; 0 takes a free one", "output", least=0, most=65535, metavar="N")

    @property
    def texts(self) -> list[str]:
        """The initial settings that were given, also from one argument such as "8 16"; see `MergeOptions.r`."""
        return [word for text in self.r for word in str(text).split()]
