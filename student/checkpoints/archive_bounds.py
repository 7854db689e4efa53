"""What a torch file may become when it is read, looked up before anything of it is: never more than the file.

torch.save stores without compressing, so an archive's entries are never larger than the file. One that says
otherwise would fill the memory from a few bytes, as would a pickle that asks for an array of any number of bytes.
It gives up files that somebody compressed again.
"""

import mmap
import os
import zipfile
from io import BufferedReader

MAGIC = b"PK\x03\x04"
ALLOCATIONS = (b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n")
"""How a pickle names the one function that torch calls for it and that fills as much memory as it is told."""
SCRIPT_ENTRY = "/constants.pkl"
"""In the archive of a compiled program, and in no other."""


def check_archive(file: BufferedReader) -> None:
    """Raise ValueError for a file that would become more than it is, or a program; leave the file at its start.

    A file that is no archive (torch's form before 1.6, or anything else) is left to whoever reads it, but for what
    it allocates.
    """
    file.seek(0)
    if file.read(len(MAGIC)) == MAGIC:
        check_entries(file)
    file.seek(0)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if any(data.find(name) >= 0 for name in ALLOCATIONS):
            raise ValueError(
                "it calls builtins.bytearray, which no checkpoint needs: do not trust where it comes from"
            )


def check_entries(file: BufferedReader) -> None:
    """Raise ValueError for an archive with compressed or overlapping entries, or of a program."""
    size_bytes = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    declared_bytes = sum(entry.file_size for entry in entries)
    if declared_bytes > size_bytes or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"its {size_bytes:,} bytes would become {declared_bytes:,}, and torch.save does not compress; save it "
            "again with torch.save if you trust where it comes from"
        )
    if any(entry.filename.endswith(SCRIPT_ENTRY) for entry in entries):
        raise ValueError("it is a TorchScript program, not weights; save the state_dict() of what it was made from")
