"""The bound on what a torch file unpacks to, looked up in its directory before anything of it is read.

torch.save stores without compressing, so the entries of its archive are never larger than the file. One that says
otherwise would fill the memory from a few bytes. It gives up files that somebody compressed again.
"""

import os
import zipfile
from io import BufferedReader

MAGIC = b"PK\x03\x04"


def check_archive(file: BufferedReader) -> None:
    """Raise ValueError when the archive's entries are larger than the file; leave the file at its start.

    A file that is no archive (torch's form before 1.6, or anything else) is left to whoever reads it.
    """
    file.seek(0)
    if file.read(len(MAGIC)) == MAGIC:
        size_bytes = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            declared_bytes = sum(entry.file_size for entry in archive.infolist())
        if declared_bytes > size_bytes:
            raise ValueError(
                f"its {size_bytes:,} bytes would become {declared_bytes:,}, and torch.save does not compress; save "
                "it again with torch.save if you trust where it comes from"
            )
    file.seek(0)
