"""Signs that a video stream is damaged. A decoder conceals what it cannot read, and the frames look like any others.

What is found: FFmpeg's own errors while it reads and decodes, frames and packets that it marks as corrupt, and bytes
that no encoder of H.264 or HEVC writes. Damage that leaves a stream legal, as some changes of single bytes do, is not
found.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import av

Said = list[tuple[int, str, str]]  # level, who, text
# Three bytes that cannot stand in a NAL unit (H.264 7.4.1, HEVC 7.4.2): encoders put a 3 between the second and third.
FORBIDDEN = re.compile(rb"\0\0[\0-\2]")

av.logging.set_skip_repeated(False)  # the same words about a second file are news


@contextmanager
def heard() -> Iterator[Said]:
    """What FFmpeg says of errors meanwhile, in this thread."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as said:
            yield said
    finally:
        av.logging.set_level(level)


class Watch:
    """Looks at one video stream while it is decoded; every method returns what is wrong, or an empty text."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        self.sources = (container.format.name, stream.codec_context.name)
        self.length_bytes = _length_bytes(stream.codec_context)

    def complaint(self, said: Said) -> str:
        """The first error of demuxer or decoder; those of other streams, such as sound, do not count."""
        return next((f"{source}: {text.strip()}" for _, source, text in said if source in self.sources), "")

    def fault(self, packet: av.Packet) -> str:
        """What is wrong with a packet before it is decoded."""
        if packet.is_corrupt:
            return "a packet is corrupt or cut off"
        if self.length_bytes and packet.size and not _is_legal(bytes(packet), self.length_bytes):
            return "bytes that no encoder writes"
        return ""


def without_past(said: Said) -> Said:
    """Without what a decoder that starts in the middle says of frames from before."""
    return [line for line in said if not line[2].startswith(("mmco: ", "co located POCs", "Missing reference picture"))]


def _length_bytes(codec: av.CodecContext) -> int:
    """Bytes of the length before each NAL unit, as MP4 and Matroska store them; 0: stored in another way."""
    place = {"h264": 4, "hevc": 21}.get(codec.name)
    extra = codec.extradata
    return (extra[place] & 3) + 1 if place and extra and len(extra) > place and extra[0] == 1 else 0


def _is_legal(packet: bytes, length_bytes: int) -> bool:
    """Whether a packet is whole NAL units of bytes that may stand in them."""
    place = 0
    while place < len(packet):
        start = place + length_bytes
        place = start + int.from_bytes(packet[place:start])
        if place > len(packet) or FORBIDDEN.search(packet[start:place].rstrip(b"\0")):  # some writers pad with zeros
            return False
    return True
