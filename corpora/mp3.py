"""MP3s whole. libsndfile reads as many frames as an MP3's first frame says, and guesses where that
says nothing: too few where the bitrate varies, those of the first recording where several are joined.
So the frames are counted here, by the four bytes that each begins with.
"""

import struct

# kbit/s by the number in a frame's header: of MPEG 1; of MPEG 2 and 2.5, which have half the rates.
BITRATES = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
LOWER_BITRATES = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN", bytes(4))


def frame_at(content: bytes, at: int) -> tuple[tuple, int, int] | None:
    """Of the frame of layer III that begins there: its kind, which is the same in all of a recording;
    its size in bytes; where in it "Xing" may stand."""
    head = int.from_bytes(content[at : at + 4], "big")
    version = head >> 19 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    layer = 4 - (head >> 17 & 3)
    bitrate = head >> 12 & 15
    rate = head >> 10 & 3
    mono = head >> 6 & 3 == 3
    if head >> 21 != 0x7FF or version == 1 or layer != 3 or bitrate in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] >> (4 - version) // 2
    if version == 3:
        size = 144_000 * BITRATES[bitrate] // hertz
        side = 17 if mono else 32
    else:
        size = 72_000 * LOWER_BITRATES[bitrate] // hertz
        side = 9 if mono else 17
    return (version, rate, mono), size + (head >> 9 & 1), 4 + side


def frames(content: bytes):
    """Each whole frame: its kind, its bytes, where in it "Xing" may stand, and how many bytes are
    between it and the one before. Those may be tags, or anything: a frame is what another of its kind
    follows; behind a frame, any other or a tag will do."""
    at = end = 0
    while at >= 0:
        if content.startswith(b"ID3", at):
            size = 0
            for byte in content[at + 6 : at + 10]:
                size = size << 7 | byte
            at = end = at + 10 + size
        found = frame_at(content, at)
        if found and at + found[1] <= len(content):
            kind, size, tag = found
            after = frame_at(content, at + size)
            is_last = at + size == len(content) or content.startswith(TAGS, at + size)
            if after and after[0] == kind or at == end and (after or is_last):
                yield kind, content[at : at + size], tag, at - end
                at = end = at + size
                continue
        at = content.find(b"\xff", at + 1)


def promised(frame: bytes, tag: int) -> int | None:
    """How many frames follow, by a first frame that holds no audio; None: it is no such frame."""
    if frame[tag : tag + 4] in (b"Xing", b"Info"):
        return int.from_bytes(frame[tag + 8 : tag + 12], "big") if frame[tag + 7] & 1 else 0
    return int.from_bytes(frame[50:54], "big") if frame[36:40] == b"VBRI" else None


def first_frame(frame: bytes, tag: int, count: int) -> bytes:
    """One that says how many frames follow, of the kind of `frame`."""
    head = int.from_bytes(frame[:4], "big") & ~0xF200 | 0x1E000  # the highest bitrate: room enough
    start = head.to_bytes(4, "big")
    size = frame_at(start, 0)[1]
    return (start.ljust(tag, b"\0") + b"Xing" + struct.pack(">II", 1, count)).ljust(size, b"\0")


def recordings(content: bytes) -> list[bytes]:
    """What an MP3 was joined from, each behind a first frame that tells how many frames there are;
    one that tells of more stays as it is, and the recording is cut short."""
    found = []  # of each: kind, first frame, how many that promises, the others
    for kind, frame, tag, gap in frames(content):
        count = promised(frame, tag)
        if count is not None:
            found.append((kind, frame, count, []))
            continue
        if not found or kind != found[-1][0]:
            found.append((kind, b"", 0, []))
        others = found[-1][-1]
        if others and gap > 4 * len(frame):  # about a tenth of a second
            raise ValueError(f"in its middle are {gap} bytes that are no MP3")
        others.append(frame)
    if not found:
        raise ValueError("it holds no frame of an MP3")
    whole = []
    for _, first, count, others in found:
        if count < len(others) - 1 or not first:
            first = first_frame(others[0], frame_at(others[0], 0)[2], len(others))
        whole.append(first + b"".join(others))
    return whole
