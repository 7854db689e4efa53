"""Which classifier of a checkpoint is which head of the manifest, and whose class list is whose; free of torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.data_manifests.errors import InputError

SOURCE = re.compile(r"(?P<head>\w+)=(?P<source>\w+)?(\[(?P<first>\d+):(?P<last>\d+)\])?")


@dataclass(frozen=True)
class HeadSource:
    """Where a head's classifier is in a checkpoint."""

    source: str
    """Name of the classifier in the file."""
    rows: tuple[int, int] | None = None
    """[first, last) of its rows; None: all."""


def head_sources(texts: Sequence[str], heads: Sequence[str], found: Sequence[str]) -> dict[str, HeadSource]:
    """Return head -> its classifier, from `--head` texts, else by the same name, else the only one there is.

    Raises InputError for a text that is none, a head that the manifest lacks, and a head without a classifier.
    """
    if not found:
        raise InputError(
            "the checkpoint has no classifier, so it is no expert yet: `train.weights` starts one from it"
        )
    given = dict(parse_source(text, heads, found) for text in texts)
    for head in heads:
        if head in given:
            continue
        if head in found:
            given[head] = HeadSource(head)
        elif len(found) == len(heads) == 1:
            given[head] = HeadSource(found[0])
        else:
            raise InputError(
                f"no classifier of the checkpoint is called {head!r}; it has {', '.join(found)}: say "
                f"which with --head {head}=NAME, or --head {head}=NAME[FIRST:LAST] for some of its rows"
            )
    return given


def parse_source(text: str, heads: Sequence[str], found: Sequence[str]) -> tuple[str, HeadSource]:
    """Return (head, its classifier) of one `--head` text."""
    match = SOURCE.fullmatch(text)
    if match is None:
        raise InputError(f"--head {text}: expected HEAD=NAME or HEAD=NAME[FIRST:LAST], e.g. verb=head[0:97]")
    head, source = match["head"], match["source"] or (found[0] if len(found) == 1 else "")
    if head not in heads:
        raise InputError(f"--head {text}: the manifest has no head {head!r}; it has {', '.join(heads)}")
    if source not in found:
        raise InputError(f"--head {text}: the checkpoint's classifiers are {', '.join(found)}")
    rows = None if match["first"] is None else (int(match["first"]), int(match["last"]))
    return head, HeadSource(source, rows)


def class_files(texts: Sequence[str], heads: Sequence[str]) -> Mapping[str, Path]:
    """Return head -> class list, from `--classes` texts: FILE where there is one head, HEAD=FILE otherwise."""
    files: dict[str, Path] = {}
    for text in texts:
        head, equals, path = text.partition("=")
        if not (equals and head in heads):
            head, path = heads[0], text
            if len(heads) > 1:
                raise InputError(
                    f"--classes {text}: the manifest has heads {', '.join(heads)}; give HEAD=FILE for each"
                )
        if head in files:
            raise InputError(f"--classes {text}: head {head!r} has a class list already")
        files[head] = Path(path)
    if missing := [head for head in heads if head not in files]:
        raise InputError(f"head {missing[0]!r} has no class list; give one with --classes {missing[0]}=FILE")
    return files
